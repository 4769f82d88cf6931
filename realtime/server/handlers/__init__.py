"""Running the application's handlers: on the loop, in threads, in processes; and what may refuse them."""

"""Running the application's handlers: on the loop, in threads and in processes."""

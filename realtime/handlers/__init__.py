"""Runs the handlers of an application: on the loop, in threads, or in processes of their own."""

"""The server API, without I/O: its operations, and their form as HTTP methods."""

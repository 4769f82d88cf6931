"""A worker process: builds the server from its parts and serves its slot's sockets."""

"""The port for clients: connections, their handshakes, and the transports that they come by."""

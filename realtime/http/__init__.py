"""Codecs for HTTP/1.1 and WebSocket without I/O: request heads and bodies, handshakes, frames, CORS, proxy headers."""

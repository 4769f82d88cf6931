"""HTTP/1.1 and WebSocket codecs, without I/O: request heads, bodies, handshakes, frames, CORS, forwarded addresses."""

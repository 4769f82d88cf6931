"""The clients' port of a worker: HTTP, WebSocket and streams, with their connections."""

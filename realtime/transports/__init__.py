"""The clients' port of a worker: its frontend, and the HTTP, WebSocket and stream connections behind it."""

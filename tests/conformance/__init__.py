"""Recorded conversations of clients with a Centrifugo server, and the player that has them with this server."""

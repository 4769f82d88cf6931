"""Recorded conversations of clients with a Centrifugo server, and the player that repeats them with this server."""

"""Decisions of the supervisor, without I/O: which processes run, how healthy they are, how clients are shared out."""

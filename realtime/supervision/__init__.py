"""The pool of workers, without I/O: what is wanted, what runs, and how it is doing."""

"""The supervisor process: starts and watches the others, owns the listening sockets, steers and rescues connections."""

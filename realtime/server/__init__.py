"""The shell: sockets, processes and timers. The one room that imports twisted and autobahn."""

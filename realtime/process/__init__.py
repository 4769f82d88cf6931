"""The parts that every child process runs: its reactor, heartbeat, control link, log and diagnostics."""

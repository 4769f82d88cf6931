"""The `realtime` command: checks and writes configurations, makes tokens, shows a running server."""

"""Settings: read from a TOML file, the environment and the command line into one frozen tree."""

"""Redis, or Valkey, as a store and a bus: connections, scripts, and the servers of the configuration."""

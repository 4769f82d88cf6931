"""The operators' port, served by the supervisor: health, metrics, incidents and the live page."""

"""The operators' port: health, metrics, incidents and the live page, served by the supervisor."""

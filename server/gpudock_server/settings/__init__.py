"""Settings: their definitions, value types and sources."""

"""Commands that run in containers."""

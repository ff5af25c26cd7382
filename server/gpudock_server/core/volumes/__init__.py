"""Volumes: what can be asked of them, and the saga behind each request."""

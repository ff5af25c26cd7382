"""Middleware of every call: errors, audit, identity, disconnects, decoding."""

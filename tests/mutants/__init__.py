"""Mutation runs: one line of product code is changed at a time, and the fast tests should fail (docs/testing.md)."""

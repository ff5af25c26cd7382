"""Mutation runs: the code is changed at one place at a time, and a fast test should fail; see docs/testing.md."""

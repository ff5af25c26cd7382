"""Records that an earlier version wrote, and that every later one reads: see docs/testing.md."""

"""Recordings of records of earlier versions, which every later version must read; see docs/testing.md."""

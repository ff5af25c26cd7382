"""The wire: servicers, conversion between messages and records, and what is around every call."""

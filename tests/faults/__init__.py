"""What dies, and what must be true afterwards."""

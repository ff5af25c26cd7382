"""Installing: the wheel that is built from a checkout."""

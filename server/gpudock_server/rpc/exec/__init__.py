"""ExecContainer: one call, and its requests."""

"""ExecContainer: one call, its requests and messages."""

"""ContainerService: its requests to commands, records to its messages."""

"""Which GPUs and ports a container is given."""

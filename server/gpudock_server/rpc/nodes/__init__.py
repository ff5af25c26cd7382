"""NodeService, and its messages: nodes, GPUs, drift."""

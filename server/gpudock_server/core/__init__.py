"""The use cases. Core uses the protocols of `ports`, and knows nothing of gRPC, Docker, etcd or NVML."""

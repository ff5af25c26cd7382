"""The adapters to the engine, the store, the GPU driver and the host. Each implements protocols of `ports`."""

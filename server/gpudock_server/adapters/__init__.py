"""What touches the outside world: the engine, the store, the driver, the host. Each implements a protocol of ports."""

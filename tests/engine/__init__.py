"""Against a real Docker Engine and a real etcd."""

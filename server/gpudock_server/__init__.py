"""gpudockd: the daemon that gives people GPU containers on a host and changes them while they live."""

"""gpudockd: the daemon that gives people GPU containers on a host and changes them while they live."""

import os

# gRPC reads it when it is imported, which whoever imports it here does after this. Its older way of waiting for sockets
# takes a third less CPU for the output of a command: it hands less from thread to thread (docs/benchmarks.md).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

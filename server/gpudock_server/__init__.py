"""gpudockd: the daemon that manages GPU containers on a host."""

import os

# gRPC reads this when it is imported, and every module here imports gRPC after this line. Without the event engine the
# output of an exec takes a third less CPU: there are fewer switches between threads (docs/benchmarks.md).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

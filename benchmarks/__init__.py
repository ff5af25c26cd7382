"""gpudock beside the docker command line, on one engine, in one run: see docs/benchmarks.md."""

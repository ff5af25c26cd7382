"""Compares gpudock with the docker command line, on one engine and in one run; see docs/benchmarks.md."""

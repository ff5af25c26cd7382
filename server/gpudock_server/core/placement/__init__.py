"""Allocation of GPUs and host ports to containers, and the claims on them."""

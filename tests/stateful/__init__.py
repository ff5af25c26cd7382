"""Random sequences of everything that can happen to a host, held against a model of what must be true."""

"""Random sequences of requests, faults and outside changes, compared with a model of the expected state."""

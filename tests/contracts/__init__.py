"""One suite for each port: what its docstrings promise, held against the real adapter and against each fake."""

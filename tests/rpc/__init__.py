"""The wire: validation, conversion, interceptors, listeners."""

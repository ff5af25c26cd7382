"""Use cases. Core speaks the protocols of `ports` and knows no wire, engine, store or driver."""

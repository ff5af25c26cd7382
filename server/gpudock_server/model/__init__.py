"""Frozen records and their transitions; no I/O.

Everything that is stored or passed between rooms of the house is one of these. A record never changes: a transition
returns a new one.
"""

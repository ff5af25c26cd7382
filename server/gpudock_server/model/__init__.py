"""Frozen records and their transitions; no I/O.

Everything that is stored, or passed between packages, is one of these records. A transition returns a new record.
"""

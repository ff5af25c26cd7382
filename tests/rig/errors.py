"""Errors of the rig itself, as opposed to errors of the tested programs."""


class RigError(Exception):
    """A part of the rig did not start, did not answer, or could not be removed."""

"""What goes wrong with the rig itself, as opposed to what is tested on it."""


class RigError(Exception):
    """A part of the rig did not start, did not answer, or could not be removed."""

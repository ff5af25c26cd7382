"""Rules that the requests of all resources share: every violation of the contract is reported at once.

The functions of `requests` and `*_request` modules take a message and return what core takes, or raise InvalidArgument
with all that is wrong. They do not look at the state of the node: whether a GPU is free is decided in core.
"""

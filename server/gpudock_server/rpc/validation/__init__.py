"""Validation rules that the requests of all resources share.

The functions of the modules `requests` and `*_request` convert a message to a command of core, or raise InvalidArgument
with all violations at once. They do not read the state of the node: core decides, for example, whether a GPU is free.
"""

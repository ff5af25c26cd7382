"""Work on whole file trees in a child process: measure, mirror, compare, digest and remove them.

Trees belong to tenants, so their size, depth and shape are hostile input. The code opens one name at a time relative to
directory descriptors, never uses a path that grows with the depth, and needs memory in proportion to the number of
entries. The modules that the child loads (all but `worker`) import neither asyncio nor pydantic: the child must start
in milliseconds.
"""

"""Work on whole trees of files: measure, mirror, compare, digest and remove them, in a child process.

Trees belong to tenants, so their size, depth and shape are hostile input. Everything here uses directory descriptors,
one name at a time, never a path that grows with the depth, and memory in proportion to the number of entries. The
modules that the child loads (all but `worker` and `stalls`) import neither asyncio nor pydantic: the child has to start
in milliseconds.
"""

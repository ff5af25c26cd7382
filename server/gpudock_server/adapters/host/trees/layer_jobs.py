"""The jobs on layers of images, whose tars are a tenant's too: what each of them says, and several made one.

See `jobs` for what runs them, and `layer_merge` for what they do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.jobs import JobRefusedError
from gpudock_server.adapters.host.trees.layer_merge import merge_layers, write_merged
from gpudock_server.adapters.host.trees.layer_tar import BrokenTarError, LayerIndex, read_layer


@dataclass
class LayerJobs:
    """Layers are named by their digests. The index of each stays in memory until the process ends."""

    interrupt: Interrupt
    indexes: dict[str, LayerIndex] = field(default_factory=dict)

    def index(self, *, digest: str, path: str) -> dict[str, Any]:
        """Index the tar at `path`. Raises JobRefusedError where it is none."""
        with _refusals(), Path(path).open("rb") as file:
            self.indexes[digest] = read_layer(file)
        return {}

    def merge(self, *, upper: list[list[str]], below: list[str], target: str) -> dict[str, Any]:
        """Write the layer that is all of `upper` (digest and path of each, the lowest first) into the file `target`.

        `below` are the digests of the layers that it is to lie on, the lowest first. Returns its digest. Raises
        JobRefusedError.
        """
        with _refusals(), ExitStack() as stack:
            seen = merge_layers([self.indexes[digest] for digest in below])
            layers = [(self.indexes[digest], stack.enter_context(Path(path).open("rb"))) for digest, path in upper]
            out = stack.enter_context(Path(target).open("r+b"))
            write_merged(out, layers, seen, self.interrupt)
            out.flush()
            out.seek(0)
            return {"digest": f"sha256:{hashlib.file_digest(out, 'sha256').hexdigest()}"}


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except BrokenTarError as error:
        raise JobRefusedError(str(error)) from error

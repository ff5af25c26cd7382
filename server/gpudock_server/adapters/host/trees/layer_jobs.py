"""The jobs that index and merge image layers. The tars of the layers are a tenant's.

`jobs` runs them; `layer_merge` does the work.
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
    """Layers by digest. The index of each stays in memory until the process ends."""

    interrupt: Interrupt
    indexes: dict[str, LayerIndex] = field(default_factory=dict)

    def index(self, *, digest: str, path: str) -> dict[str, Any]:
        """Index the tar at `path`. Raises JobRefusedError if it is not a layer tar."""
        with _refusals(), Path(path).open("rb") as file:
            self.indexes[digest] = read_layer(file)
        return {}

    def merge(self, *, upper: list[list[str]], below: list[str], target: str) -> dict[str, Any]:
        """Merge the layers `upper` (digest and path of each, lowest first) to one layer in the file `target`.

        `below` are the digests of the layers below it, lowest first. Returns the digest of the merged layer. Raises
        JobRefusedError.
        """
        with _refusals(), ExitStack() as stack:
            known = merge_layers([self.indexes[digest] for digest in below])
            layers = [(self.indexes[digest], stack.enter_context(Path(path).open("rb"))) for digest, path in upper]
            out = stack.enter_context(Path(target).open("r+b"))
            write_merged(out, layers, known, self.interrupt)
            out.flush()
            out.seek(0)
            return {"digest": f"sha256:{hashlib.file_digest(out, 'sha256').hexdigest()}"}


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except BrokenTarError as error:
        raise JobRefusedError(str(error)) from error

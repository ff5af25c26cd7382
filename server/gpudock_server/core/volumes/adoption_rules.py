"""Which engine volumes callers may adopt, as the node's operator configures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gpudock_server.model.engine import LABEL_ADOPT, EngineVolume


@dataclass(frozen=True, slots=True)
class AdoptionRules:
    """The operator's rules. `names`: patterns of names adoptable without LABEL_ADOPT; `*` matches any text."""

    names: Sequence[str] = ()

    def allow(self, volume: EngineVolume) -> bool:
        """Whether the operator allows an engine volume to be adopted."""
        return volume.labels.get(LABEL_ADOPT) == "true" or any(fnmatchcase(volume.name, name) for name in self.names)

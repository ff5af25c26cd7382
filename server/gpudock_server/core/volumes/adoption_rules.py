"""Which volumes of the engine callers may adopt: that is for the node's operator to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gpudock_server.model.engine import LABEL_ADOPT, EngineVolume


@dataclass(frozen=True, slots=True)
class AdoptionRules:
    """`names` are those that may be adopted without LABEL_ADOPT; `*` in one stands for any characters."""

    names: Sequence[str] = ()

    def allow(self, found: EngineVolume) -> bool:
        """Whether the operator allows an engine volume to be adopted."""
        return found.labels.get(LABEL_ADOPT) == "true" or any(fnmatchcase(found.name, name) for name in self.names)

"""Store changes that claim, confirm and release GPUs and ports of one host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpudock_server.model.claims import ClaimKey, Holder
from gpudock_server.model.container import Container
from gpudock_server.model.store_changes import Claim, ConfirmClaim, ReleaseClaim


@dataclass(frozen=True, slots=True)
class HostClaims:
    """Builds the changes by which containers of a node claim and release GPUs and ports.

    `host` identifies the machine: two nodes on one host share its claims.
    """

    host: str
    node: str

    def holder(self, container: Container) -> Holder:
        """The holder that a confirmed claim of a container names."""
        return Holder(container=container.name, uid=container.uid, node=self.node)

    def claim(self, container: Container, keys: Iterable[ClaimKey]) -> list[Claim]:
        """Claim keys that have no holder."""
        return [Claim(self.host, key, self.holder(container)) for key in keys]

    def confirm(self, container: Container, keys: Iterable[ClaimKey]) -> list[ConfirmClaim]:
        """Turn the claims of an operation into claims of the container."""
        return [ConfirmClaim(self.host, key, self.holder(container)) for key in keys]

    def release(self, uid: str, keys: Iterable[ClaimKey]) -> list[ReleaseClaim]:
        """Release the claims that the container of this uid holds; claims of other containers stay."""
        return [ReleaseClaim(self.host, key, uid) for key in keys]

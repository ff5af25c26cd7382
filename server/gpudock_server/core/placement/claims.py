"""Changes of the claims on the GPUs and ports of one host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpudock_server.model.claims import ClaimKey, Holder
from gpudock_server.model.container import Container
from gpudock_server.model.store_changes import Claim, ConfirmClaim, ReleaseClaim


@dataclass(frozen=True, slots=True)
class HostClaims:
    """Builds the changes by which the containers of a node claim what its host has, and give it back.

    `host` identifies the machine: two nodes on one host share its claims.
    """

    host: str
    node: str

    def holder(self, container: Container) -> Holder:
        """What a confirmed claim of a container says."""
        return Holder(container=container.name, uid=container.uid, node=self.node)

    def claim(self, container: Container, keys: Iterable[ClaimKey]) -> list[Claim]:
        """Claim what nobody holds."""
        return [Claim(self.host, key, self.holder(container)) for key in keys]

    def confirm(self, container: Container, keys: Iterable[ClaimKey]) -> list[ConfirmClaim]:
        """Make the claims that an operation took the container's own."""
        return [ConfirmClaim(self.host, key, self.holder(container)) for key in keys]

    def release(self, uid: str, keys: Iterable[ClaimKey]) -> list[ReleaseClaim]:
        """Give back what the container of this uid holds; what another one holds is left alone."""
        return [ReleaseClaim(self.host, key, uid) for key in keys]

"""Begins an operation for a command, in the same way for every kind of resource."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.model.operation import Operation, Result

# Makes the operation draft of a command; one function per type of command.
Drafter: TypeAlias = Callable[[Any], Awaitable[OperationDraft]]


class Commands:
    """Begins operations for commands. `drafters` has the function that drafts the operation, by type of command."""

    def __init__(self, operations: Operations, drafters: Mapping[type, Drafter]) -> None:
        self._operations = operations
        self._drafters = drafters

    async def begin(self, command: object, request: RequestKey | None) -> str:
        """Record and start an operation, and return its id. Nothing is done before the operation is recorded."""
        return await self._operations.begin(lambda: self.draft(command), request)

    async def run_to_end(self, command: object, request: RequestKey | None) -> None:
        """Begin an operation without a result, such as a deletion, and wait for its end.

        Cancelling this call does not cancel the operation. Raises the error that the operation ended with.
        """
        await self._operations.done(await self.begin(command, request))

    async def preview(self, command: object) -> Operation:
        """The operation that `begin` would record, in state PLANNED and without an id. Changes nothing."""
        return self._operations.preview(await self.draft(command))

    async def _run(self, command: object, request: RequestKey | None) -> Result:
        """Begin an operation, wait for its end, and return its result. Raises as `run_to_end`."""
        return await self._operations.result(await self.begin(command, request))

    async def draft(self, command: object) -> OperationDraft:
        """The operation draft of a command. Changes nothing. Raises the error if the command is not possible."""
        return await self._drafters[type(command)](command)

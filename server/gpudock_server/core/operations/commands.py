"""Beginning operations for requests, the same way for every kind of resource."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.model.operation import Operation, Result

# Drafts the operation of a command of one type.
Drafter: TypeAlias = Callable[[Any], Awaitable[OperationDraft]]


class Commands:
    """Begins an operation for a command. Each type of command has a function that drafts its operation."""

    def __init__(self, operations: Operations, drafters: Mapping[type, Drafter]) -> None:
        self._operations = operations
        self._drafters = drafters

    async def begin(self, command: object, request: RequestKey | None) -> str:
        """Begin an operation; its id. Nothing has been done before this returns."""
        return await self._operations.begin(lambda: self.draft(command), request)

    async def run_to_end(self, command: object, request: RequestKey | None) -> None:
        """Begin an operation without a result, such as a deletion, and wait for its end.

        A caller who stops waiting does not cancel it. Raises the error that it ended with.
        """
        await self._operations.done(await self.begin(command, request))

    async def preview(self, command: object) -> Operation:
        """What `begin` would do, with nothing done: an operation that is PLANNED and has no id."""
        return self._operations.preview(await self.draft(command))

    async def _run(self, command: object, request: RequestKey | None) -> Result:
        """Begin an operation, wait for its end, and return its result. Raises as `run_to_end`."""
        return await self._operations.result(await self.begin(command, request))

    async def draft(self, command: object) -> OperationDraft:
        """The operation of a command, with nothing done. Raises what stands against it."""
        return await self._drafters[type(command)](command)

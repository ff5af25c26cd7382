"""An operation in this process, and what a watcher sees of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Saga, Step
from gpudock_server.errors import StoreFull
from gpudock_server.model.operation import Operation
from gpudock_server.model.record import Record

# A quick reader is told of progress this often at most; a pull reports each of its chunks.
_PROGRESS_INTERVAL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class OperationView:
    """An operation as a watcher sees it, with the progress of its current stage. `message` is about that stage."""

    operation: Operation
    current_bytes: int = 0
    total_bytes: int = 0
    message: str = ""


@dataclass(eq=False)
class ActiveOperation(OperationRun):
    """An operation in this process. Only its own task writes its record."""

    record: Operation
    version: int
    saga: Saga[Any]
    # Begins a part of it, or finds the one that was begun, and waits for its end.
    child_runner: Callable[[Operation, str, Callable[[], Awaitable[OperationDraft]]], Awaitable[None]]
    current_bytes: int = 0
    total_bytes: int = 0
    messages: list[str] = field(default_factory=list)
    cancel_requested: bool = False
    step: Step | None = None
    # Why it waits, where its callers are not to wait with it.
    blocked: StoreFull | None = None
    step_task: asyncio.Task[Record | None] | None = None
    _description: str = ""
    _notified_at: float = 0.0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    @override
    def operation(self) -> Operation:
        return self.record

    @override
    def progress(self, current_bytes: int, total_bytes: int) -> None:
        self.current_bytes, self.total_bytes = current_bytes, total_bytes
        moment = time.monotonic()
        if moment - self._notified_at >= _PROGRESS_INTERVAL_SECONDS or current_bytes == total_bytes:
            self._notified_at = moment
            self.notify_watchers()

    @override
    def set_stage_message(self, message: str) -> None:
        if message != self._description:
            self._description = message
            self.notify_watchers()

    @property
    def in_interruptible_step(self) -> bool:
        """Whether it is in a step that a stop leaves, and that a start does not wait for."""
        return self.step is not None and self.step.interruptible

    def cancel_interruptible_step(self) -> None:
        """Break off a step that the next daemon does again."""
        if self.in_interruptible_step and self.step_task is not None:
            self.step_task.cancel()

    @override
    def add_message(self, message: str) -> None:
        self.messages.append(message)

    @override
    async def run_child(self, name: str, draft: Callable[[], Awaitable[OperationDraft]]) -> None:
        await self.child_runner(self.record, name, draft)

    @property
    def view(self) -> OperationView:
        """The operation as it is now."""
        return OperationView(self.record, self.current_bytes, self.total_bytes, self._description)

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change; take it before looking."""
        return self._changed

    def block(self, error: StoreFull | None) -> None:
        """It waits for something that nobody can tell the end of; None: no longer."""
        changed, self.blocked = self.blocked != error, error
        if changed:
            self.notify_watchers()

    def notify_watchers(self) -> None:
        """Wake every watcher. Each looks at what is then current: what a slow one missed costs nothing."""
        self._changed.set()
        self._changed = asyncio.Event()

"""An operation that this process drives, and its view for watchers."""

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

# The shortest interval between two progress events of a stage: a pull reports every chunk.
_PROGRESS_INTERVAL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class OperationView:
    """An operation with the progress of its current stage, in bytes, and that stage's message."""

    operation: Operation
    current_bytes: int = 0
    total_bytes: int = 0
    message: str = ""


@dataclass(eq=False)
class ActiveOperation(OperationRun):
    """An operation that this process drives. Only the operation's own task writes its record."""

    record: Operation
    version: int
    saga: Saga[Any]
    # Begins a child operation, or finds it where it was begun before, and waits for its end.
    child_runner: Callable[[Operation, str, Callable[[], Awaitable[OperationDraft]]], Awaitable[None]]
    current_bytes: int = 0
    total_bytes: int = 0
    messages: list[str] = field(default_factory=list)
    cancel_requested: bool = False
    step: Step | None = None
    # Why the operation waits for space in the store. Callers get this error instead of waiting.
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
        """Whether the current step is interruptible; see `Step.interruptible`."""
        return self.step is not None and self.step.interruptible

    def cancel_interruptible_step(self) -> None:
        """Cancel the current step if it is interruptible; the next daemon repeats it."""
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
        """The operation and its progress as of now."""
        return OperationView(self.record, self.current_bytes, self.total_bytes, self._description)

    @property
    def changed(self) -> asyncio.Event:
        """An event that the next change sets. Take it before reading `view`, or a change may be missed."""
        return self._changed

    def block(self, error: StoreFull | None) -> None:
        """Record that the operation waits for space in the store, for an unknown time; None: no longer."""
        changed, self.blocked = self.blocked != error, error
        if changed:
            self.notify_watchers()

    def notify_watchers(self) -> None:
        """Wake every watcher. Each reads the current view, so a slow watcher skips what is outdated."""
        self._changed.set()
        self._changed = asyncio.Event()

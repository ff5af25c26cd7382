"""Drives a saga: its steps, the commit and the cleanup steps; or, after a failure, the undo."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import structlog

from gpudock_server.core.operations.active_operation import ActiveOperation
from gpudock_server.core.operations.journal import Journal, OperationSuspended, OwnershipLost
from gpudock_server.core.operations.saga import Step
from gpudock_server.errors import Code, EngineUnavailable, GpudockError, OperationCancelled, OperationFailed
from gpudock_server.model.operation import Operation, OperationState, RecordedError, StageState
from gpudock_server.model.record import now
from gpudock_server.model.store_changes import StoreChange

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Retries of an undo or cleanup step that the engine refuses; one that the engine does not answer is retried without
# limit. After these the failure goes into the operation's message, and reconcile does the rest.
_MAX_REFUSED_TRIES = 3


class Driver:
    """Drives the operations of this process, each in a task of its own."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def run(self, running: ActiveOperation) -> None:
        """Drive an operation to its end, or suspend it at a recorded step. Raises only CancelledError."""
        with structlog.contextvars.bound_contextvars(
            operation_id=running.record.id, kind=running.record.kind.value, target=running.record.target.name
        ):
            try:
                await self._drive(running)
            except OperationSuspended:
                log.info("operation suspended for shutdown", stage=running.record.current_stage)
            except OwnershipLost:
                log.warning("operation owned by another process")
            except Exception:
                # A defect of gpudock. The record keeps its last step, and the next daemon tries again.
                log.exception("operation stopped by internal error")
            finally:
                running.notify_watchers()

    async def _drive(self, running: ActiveOperation) -> None:
        if running.record.state is OperationState.RUNNING and not running.record.committed:
            try:
                for index, step in enumerate(running.saga.steps):
                    await self._run_step(running, index, step)
                await self._record_success(running)
            except (OperationSuspended, OwnershipLost):
                raise
            except Exception as error:  # noqa: BLE001 (a defect in a step must be undone like any other failure)
                await self._begin_undo(running, error)
        if running.record.state is OperationState.UNDOING:
            await self._undo(running)
        elif running.record.state is OperationState.RUNNING:
            await self._run_cleanup_steps(running)

    async def _run_step(self, running: ActiveOperation, index: int, step: Step) -> None:
        if running.record.stages[index].state is StageState.DONE:
            return
        self._check_stop_requested(running)
        running.record = running.record.with_stage(index, state=StageState.RUNNING, start_time=now())
        running.current_bytes = running.total_bytes = 0
        running.step = step
        running.notify_watchers()
        running.step_task = asyncio.ensure_future(step.do(running))
        try:
            result = await running.step_task
        except asyncio.CancelledError:
            if running.cancel_requested and running.step_task.cancelled():
                raise OperationCancelled(operation_id=running.record.id) from None
            if step.interruptible:
                self._journal.raise_if_draining()
            raise
        finally:
            running.step_task.cancel()
            running.step = running.step_task = None
            running.set_stage_message("")
        done = running.record.with_stage(
            index,
            state=StageState.DONE,
            end_time=now(),
            current_bytes=running.current_bytes,
            total_bytes=running.total_bytes,
            facts=result.model_dump(mode="json") if result is not None else {},
        )
        await self._journal.record(running, done)

    def _check_stop_requested(self, running: ActiveOperation) -> None:
        self._journal.raise_if_draining()
        if running.cancel_requested and not running.record.committed:
            raise OperationCancelled(operation_id=running.record.id)

    async def _record_success(self, running: ActiveOperation) -> None:
        self._check_stop_requested(running)
        index = len(running.saga.steps)
        starting = running.record.with_stage(index, state=StageState.RUNNING, start_time=now())
        running.record = starting

        async def changes(view: object) -> tuple[Operation, Sequence[StoreChange]]:
            outcome = await running.saga.success_changes(running, view)
            committed = starting.with_stage(index, state=StageState.DONE, end_time=now()).changed(
                committed=True, result=outcome.result
            )
            if running.saga.cleanup_steps:
                return committed, outcome.changes
            return self._journal.close_record(committed, OperationState.SUCCEEDED, outcome.changes)

        await self._journal.transact(running, changes)

    async def _run_cleanup_steps(self, running: ActiveOperation) -> None:
        """Run the steps after the commit, and record the end. A step that fails is retried."""
        first = len(running.saga.steps) + 1
        for offset, step in enumerate(running.saga.cleanup_steps):
            await self._retry_step(running, first + offset, step)
        if not running.record.state.ended:

            async def changes(_: object) -> tuple[Operation, Sequence[StoreChange]]:
                return self._journal.close_record(running.record, OperationState.SUCCEEDED, ())

            await self._journal.transact(running, changes)

    async def _retry_step(self, running: ActiveOperation, index: int, step: Step) -> None:
        tries = 0
        while running.record.stages[index].state is not StageState.DONE:
            try:
                await self._run_step(running, index, step)
            except EngineUnavailable as error:
                await self._journal.wait_before_retry(tries, error)
            except GpudockError as error:
                if tries >= _MAX_REFUSED_TRIES:
                    # The result is committed, so the operation succeeds; reconcile does this step's work later.
                    running.add_message(f"step {step.name} failed after the commit: {error}")
                    await self._journal.record(
                        running, running.record.with_stage(index, state=StageState.DONE, end_time=now())
                    )
                    return
                await self._journal.wait_before_retry(tries, error)
            tries += 1

    async def _begin_undo(self, running: ActiveOperation, error: Exception) -> None:
        if not isinstance(error, GpudockError):
            error_id = uuid.uuid4().hex[:12]
            log.error(
                "step failed with internal error",
                error_id=error_id,
                stage=running.record.current_stage,
                exc_info=error,
            )
            recorded = RecordedError(
                code=Code.INTERNAL,
                reason="INTERNAL",
                message=f"internal error, id {error_id}",
                metadata={"error_id": error_id},
            )
        else:
            log.info("undoing operation", reason=error.reason, detail=error.message)
            recorded = recorded_error(error)
        await self._journal.record(
            running,
            running.record.changed(
                state=OperationState.UNDOING,
                error=recorded,
                cancel_requested=isinstance(error, OperationCancelled),
            ),
        )

    async def _undo(self, running: ActiveOperation) -> None:
        for index in range(len(running.saga.steps) - 1, -1, -1):
            stage = running.record.stages[index]
            if stage.state in (StageState.DONE, StageState.RUNNING):
                await self._undo_step(running, running.saga.steps[index])
                await self._journal.record(running, running.record.with_stage(index, state=StageState.UNDONE))

        async def changes(view: object) -> tuple[Operation, Sequence[StoreChange]]:
            state = OperationState.CANCELLED if running.record.cancel_requested else OperationState.FAILED
            remaining = await running.saga.failure_changes(running, view)
            return self._journal.close_record(running.record, state, remaining)

        tries = 0
        while not running.record.state.ended:
            try:
                await self._journal.transact(running, changes)
            except EngineUnavailable as error:
                # The final record needs the status that the engine shows, so it waits for the engine.
                await self._journal.wait_before_retry(tries, error)
                tries += 1

    async def _undo_step(self, running: ActiveOperation, step: Step) -> None:
        if step.undo is None:
            return
        tries = 0
        while True:
            self._journal.raise_if_draining()
            try:
                await step.undo(running)
            except EngineUnavailable as error:
                await self._journal.wait_before_retry(tries, error)
            except GpudockError as error:
                if tries >= _MAX_REFUSED_TRIES:
                    running.add_message(f"undo of step {step.name} failed: {error}")
                    return
                await self._journal.wait_before_retry(tries, error)
            else:
                return
            tries += 1


def recorded_error(error: GpudockError) -> RecordedError:
    """The form in which an operation's record keeps an error."""
    if isinstance(error, OperationFailed):
        return RecordedError(
            code=error.recorded_code,
            reason=error.recorded_reason,
            message=error.recorded_message,
            metadata=error.recorded_metadata,
        )
    return RecordedError(code=error.code, reason=error.reason, message=error.message, metadata=error.metadata)

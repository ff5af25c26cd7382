"""An engine container is started with the docker command during an operation on it."""

from __future__ import annotations

import asyncio
import signal

from tests.calls import Caller, failure
from tests.engine.drift import engine_action
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.faults.instrumented_daemon import DIE_AT, KIND, SIGNAL
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, require_consistent
from tests.rig.patience import in_time

__all__ = ["daemons"]

_STOPPED = "before record of RUNNING after stop"


async def test_no_layer_is_transferred_while_its_engine_container_runs(daemons: IsolatedDaemons) -> None:
    """The daemon is stopped with SIGSTOP after it stopped a container, which `docker start` then starts."""
    environment = {KIND: "SCALE", DIE_AT: _STOPPED, SIGNAL: signal.SIGSTOP.name}
    daemon = await daemons.start(
        "--layer-carry", "exchange", module="tests.faults.instrumented_daemon", environment=environment
    )
    async with Caller(daemon.target) as caller:
        made = await caller.create("touched", 1)
        await caller.shell("touched", WRITE_FILES)
        files = await caller.shell("touched", SHOW_FILES)
        scale = asyncio.create_task(failure(caller.scale("touched", 2)))

        async def frozen() -> bool:
            return f"]: {_STOPPED}\nchildren:" in daemon.log_text

        await until(frozen)
        await asyncio.to_thread(engine_action, daemons.rig, made.status.engine_id, "start")
        daemon.signal(signal.SIGCONT)
        async with in_time("no end of the scale"):
            refused = await scale
        assert refused.reason == "LAYER_CARRY_FAILED"
        assert "is running; it must be stopped" in refused.message
        assert (
            await require_consistent(caller, daemons.rig, "touched", files)
        ).status.engine_id == made.status.engine_id
        assert (await caller.scale("touched", 2)).spec.gpus.count == 2
        await require_consistent(caller, daemons.rig, "touched", files)

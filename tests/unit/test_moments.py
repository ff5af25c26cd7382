"""The moments at which tests kill daemons: which ones are required follows from the stages of a saga."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest
from gpudock_server.adapters.host.subprocesses import with_parent_death_signal
from gpudock_server.adapters.volumes.private_mounts import MountedView

from tests.faults.daemon_killer import (
    Moment,
    MomentLog,
    calls_without_moment,
    minimum_moments,
    missing_moments,
    missing_undo_moments,
    require_children_exit,
)
from tests.faults.instrumented_daemon import BY_CHILDREN, CALLS, children, program
from tests.rig.patience import in_time, limit

_STAGES = ("create", "verify", "commit", "retire")
_FORWARD = """
stages: create verify commit retire
moment 1 [create]: before record of RUNNING after nothing
moment 2 [create]: before Engine.create
moment during 1 [create]: in Engine.create
moment 3 [create]: before record of RUNNING after create
moment 4 [verify]: before record of RUNNING after verify
moment 5 [commit]: before record of RUNNING after commit
moment 6 [retire]: before SnapshotStore.seal
moment 7 [retire]: before record of RUNNING after retire
moment 8 [end]: before record of SUCCEEDED after retire
moment 9 [end]: after record of SUCCEEDED after retire
"""


def test_a_log_shows_the_stages_and_the_moments() -> None:
    log = MomentLog(f"{_FORWARD}dying at moment during 1 [create]: in Engine.create\nchildren: 7:cp 8:etcd\n")
    assert log.stages == _STAGES
    assert [moment.number for moment in log.between] == [str(number) for number in range(1, 10)]
    assert log.during == [Moment("during 1", "create", "in Engine.create")] == [log.killed_at]
    assert log.children == {7: "cp"}, "etcd is not a child that must exit"
    assert MomentLog("").killed_at is None


def test_a_log_with_a_record_and_a_change_for_each_stage_misses_nothing() -> None:
    log = MomentLog(_FORWARD)
    assert missing_moments(log.stages, log.between) == []
    # The begin, a record of each of the four stages, the end, the moment after it, and two changes.
    assert minimum_moments(log.stages) == len(log.between) == 9


@pytest.mark.parametrize("number", range(1, 10))
def test_a_moment_that_is_absent_is_missing(number: int) -> None:
    log = MomentLog(_FORWARD)
    left = [moment for moment in log.between if moment.number != str(number)]
    assert len(missing_moments(log.stages, left)) == 1
    # Fewer moments than the stages require show that a call is no longer instrumented.
    assert len(left) < minimum_moments(log.stages)


def test_the_record_of_the_commit_is_the_last_without_a_stage_after_it() -> None:
    names = ["before record of RUNNING after nothing", "before Engine.pause", "before record of RUNNING after pause",
             "before record of SUCCEEDED after commit", "after record of SUCCEEDED after commit"]  # fmt: skip
    moments = [Moment(str(number), "pause", name) for number, name in enumerate(names, 1)]
    assert missing_moments(("pause", "commit"), moments) == []
    assert minimum_moments(("pause", "commit")) == len(moments)


def test_an_undo_has_a_record_of_each_step() -> None:
    records = ["before record of UNDOING after verify", "before record of UNDOING after create"]
    ends = ["before record of FAILED after nothing", "after record of FAILED after nothing"]
    begin = ["before record of UNDOING after verify"]

    def lacks(*names: str) -> list[str]:
        return missing_undo_moments(_STAGES, [Moment("1", "", name) for name in names])

    assert lacks(*begin, *records, *ends) == []
    assert lacks(*begin, records[0], *ends) == ["3 records of UNDOING, but 2"]
    assert lacks(*begin, *records, ends[0]) == ["the records of its end"]


@pytest.mark.parametrize("call", ["Engine.create", "LayerStore.exchange", *sorted(BY_CHILDREN)])
def test_a_long_call_requires_a_moment_during_the_call(call: str) -> None:
    before, after = Moment("1", "", f"before {call}"), Moment("2", "", "before record of RUNNING after it")
    within = Moment("during 1", "", "during the call")
    assert calls_without_moment([before, within, after]) == []
    assert calls_without_moment([before, after, within]) == [f"a moment in the midst of {call}"]
    assert calls_without_moment([before]) == [f"a moment in the midst of {call}"]


def test_short_calls_require_no_moment_during_the_call() -> None:
    assert (
        calls_without_moment(
            [Moment("1", "", "before RevisionBackupStore.write"), Moment("2", "", "before record of it")]
        )
        == []
    )


def test_calls_with_child_processes_are_instrumented_calls() -> None:
    assert {f"{port.__name__}.{call}" for port, (changing, _) in CALLS.items() for call in changing} >= BY_CHILDREN


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["/sbin/mkfs.xfs", "-q", "image"], "mkfs.xfs"),
        (["losetup", "--json", "--associated", "image"], ""),
        (["du", "--summarize"], ""),
        (MountedView(pid=17).nsenter_command("xfs_growfs", "-d", "/mnt"), "xfs_growfs"),
        (["unshare", "--mount", "--", "/bin/sh"], "unshare"),
    ],
)
def test_a_program_is_named_without_its_wrapper(command: list[str], name: str) -> None:
    wrapped = with_parent_death_signal(command)
    assert wrapped[0] == "setpriv"
    assert program(wrapped) == program(command) == name


def test_a_child_process_is_listed_until_it_is_reaped_and_required_to_exit() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"],
                               stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == b"1\n"
        listed = dict(child.split(":") for child in children())
        assert listed[str(sleeper.pid)].startswith("python")
        with pytest.raises(AssertionError, match=f"children outlive their daemon: .*{sleeper.pid} sleeper"):
            asyncio.run(require_children_exit({os.getpid(): "this", sleeper.pid: "sleeper"}, seconds=0.1))
    finally:
        sleeper.kill()
    # A zombie has exited as well.
    asyncio.run(require_children_exit({sleeper.pid: "sleeper"}))
    sleeper.communicate()
    assert str(sleeper.pid) not in dict(child.split(":") for child in children())


async def test_a_time_limit_fails_with_a_message() -> None:
    with pytest.raises(AssertionError, match=r"the test did not end within 0.01 s: the log"):
        async with in_time("the test did not end", 0.01 / limit(1), lambda: "the log"):
            await asyncio.Event().wait()

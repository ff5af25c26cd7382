"""What tests that kill daemons demand of the moments that they were given: it follows from the stages of a saga."""

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
    assert [one.number for one in log.between] == [str(number) for number in range(1, 10)]
    assert log.during == [Moment("during 1", "create", "in Engine.create")] == [log.died_at]
    assert log.children == {7: "cp"}, "etcd ends in its own time"
    assert MomentLog("").died_at is None


def test_nothing_is_missing_where_each_stage_has_its_record_and_its_change() -> None:
    log = MomentLog(_FORWARD)
    assert missing_moments(log.stages, log.between) == []
    # The begin, a record of each of the four stages, the end and what is after it; and two changes.
    assert minimum_moments(log.stages) == len(log.between) == 9


@pytest.mark.parametrize("number", range(1, 10))
def test_a_moment_that_does_not_come_is_missing(number: int) -> None:
    log = MomentLog(_FORWARD)
    left = [one for one in log.between if one.number != str(number)]
    assert len(missing_moments(log.stages, left)) == 1
    # An instrument that is gone counts less than the stages demand.
    assert len(left) < minimum_moments(log.stages)


def test_without_a_stage_after_the_commit_its_record_is_the_last() -> None:
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
def test_a_call_that_takes_its_time_has_a_moment_in_its_midst(call: str) -> None:
    before, after = Moment("1", "", f"before {call}"), Moment("2", "", "before record of RUNNING after it")
    within = Moment("during 1", "", "while it works")
    assert calls_without_moment([before, within, after]) == []
    assert calls_without_moment([before, after, within]) == [f"a moment in the midst of {call}"]
    assert calls_without_moment([before]) == [f"a moment in the midst of {call}"]


def test_other_calls_need_none() -> None:
    assert (
        calls_without_moment(
            [Moment("1", "", "before RevisionBackupStore.write"), Moment("2", "", "before record of it")]
        )
        == []
    )


def test_calls_that_work_by_children_are_calls() -> None:
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
def test_a_program_is_named_and_not_what_guards_it(command: list[str], name: str) -> None:
    guarded = with_parent_death_signal(command)
    assert guarded[0] == "setpriv"
    assert program(guarded) == program(command) == name


def test_a_child_process_is_listed_until_it_is_waited_for_and_missed_until_it_ends() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"],
                               stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == b"1\n"
        named = dict(one.split(":") for one in children())
        assert named[str(sleeper.pid)].startswith("python")
        with pytest.raises(AssertionError, match=f"children outlive their daemon: .*{sleeper.pid} sleeper"):
            asyncio.run(require_children_exit({os.getpid(): "this", sleeper.pid: "sleeper"}, seconds=0.1))
    finally:
        sleeper.kill()
    # A process that nobody has waited for has ended as well.
    asyncio.run(require_children_exit({sleeper.pid: "sleeper"}))
    sleeper.communicate()
    assert str(sleeper.pid) not in dict(one.split(":") for one in children())


async def test_what_takes_too_long_fails_with_a_message() -> None:
    with pytest.raises(AssertionError, match=r"it did not end within 0.01 s: the log"):
        async with in_time("it did not end", 0.01 / limit(1), lambda: "the log"):
            await asyncio.Event().wait()

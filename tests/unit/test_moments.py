"""What tests that kill daemons demand of the moments that they were given: it follows from the stages of a saga."""

from __future__ import annotations

import pytest

from tests.faults.killing import Log, Moment, least, missing, missing_of_undo

_STAGES = ("create", "verify", "commit", "retire")
_FORWARD = """
stages: create verify commit retire
moment 1 [create]: before record of RUNNING after nothing
moment 2 [create]: before create
moment during 1 [create]: in create
moment 3 [create]: before record of RUNNING after create
moment 4 [verify]: before record of RUNNING after verify
moment 5 [commit]: before record of RUNNING after commit
moment 6 [retire]: before remove
moment 7 [retire]: before record of RUNNING after retire
moment 8 [end]: before record of SUCCEEDED after retire
moment 9 [end]: after record of SUCCEEDED after retire
"""


def test_a_log_shows_the_stages_and_the_moments() -> None:
    log = Log(f"{_FORWARD}dying at moment during 1 [create]: in create\nchildren: 7:cp 8:etcd\n")
    assert log.stages == _STAGES
    assert [one.number for one in log.between] == [str(number) for number in range(1, 10)]
    assert log.during == [Moment("during 1", "create", "in create")] == [log.died_at]
    assert log.children == {7: "cp"}, "etcd ends in its own time"
    assert Log("").died_at is None


def test_nothing_is_missing_where_each_stage_has_its_record_and_its_change() -> None:
    log = Log(_FORWARD)
    assert missing(log.stages, log.between) == []
    # The begin, a record of each of the four stages, the end and what is after it; and two changes.
    assert least(log.stages) == len(log.between) == 9


@pytest.mark.parametrize("number", range(1, 10))
def test_a_moment_that_does_not_come_is_missing(number: int) -> None:
    log = Log(_FORWARD)
    left = [one for one in log.between if one.number != str(number)]
    assert len(missing(log.stages, left)) == 1
    # An instrument that is gone counts less than the stages demand.
    assert len(left) < least(log.stages)


def test_without_a_stage_after_the_commit_its_record_is_the_last() -> None:
    names = ["before record of RUNNING after nothing", "before pause", "before record of RUNNING after pause",
             "before record of SUCCEEDED after commit", "after record of SUCCEEDED after commit"]  # fmt: skip
    moments = [Moment(str(number), "pause", name) for number, name in enumerate(names, 1)]
    assert missing(("pause", "commit"), moments) == []
    assert least(("pause", "commit")) == len(moments)


def test_an_undo_has_a_record_of_each_step() -> None:
    records = ["before record of UNDOING after verify", "before record of UNDOING after create"]
    ends = ["before record of FAILED after nothing", "after record of FAILED after nothing"]
    begin = ["before record of UNDOING after verify"]

    def lacks(*names: str) -> list[str]:
        return missing_of_undo(_STAGES, [Moment("1", "", name) for name in names])

    assert lacks(*begin, *records, *ends) == []
    assert lacks(*begin, records[0], *ends) == ["3 records of UNDOING, but 2"]
    assert lacks(*begin, *records, ends[0]) == ["the records of its end"]

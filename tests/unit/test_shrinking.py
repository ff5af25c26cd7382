"""Shrinking of random sequences that failed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stateful.sequence_shrinker import ReplayedDraws, Step, StepNotApplicableError, failure_location, shrink


def steps(count: int) -> list[Step]:
    """Return steps that are named by numbers."""
    return [Step(str(number), {}, draws=False) for number in range(count)]


def numbers(sequence: Sequence[Step]) -> set[int]:
    """Return the numbers of steps."""
    return {int(step.rule) for step in sequence}


@given(needed=st.sets(st.integers(0, 49), min_size=1, max_size=4))
def test_only_the_needed_steps_are_left(needed: set[int]) -> None:
    shrunk = shrink(steps(50), lambda part: needed <= numbers(part), 60)
    assert shrunk.failed_again
    assert numbers(shrunk.steps) == needed
    assert shrunk.played < 300
    assert all(f"  {number}()" in str(shrunk) for number in needed)


def test_a_sequence_that_does_not_fail_again_is_not_shortened() -> None:
    shrunk = shrink(steps(50), lambda _part: False, 60)
    assert not shrunk.failed_again
    assert len(shrunk.steps) == 50
    assert shrunk.played == 1
    assert "depends on timing" in str(shrunk)


def test_shrinking_stops_after_its_time_limit() -> None:
    shrunk = shrink(steps(50), lambda part: 7 in numbers(part), 0)
    assert shrunk.failed_again
    assert shrunk.played == 1
    assert len(shrunk.steps) == 50


def test_recorded_draws_are_replayed_if_they_are_possible() -> None:
    step = Step("scale", {"gpus": 1}, draws=True)
    step.drawn += [("which", "'ada'"), ("trouble", "'none'"), ("nth", 3), ("really", 1)]
    assert str(step) == "scale(gpus=1, which=\"'ada'\", trouble=\"'none'\", nth=3, really=1)"
    replay = ReplayedDraws(step)
    assert replay.choose(["bob", "ada"], "which") == "ada"
    assert replay.choose(["kill", "none"], "trouble") == "none"
    assert replay.number(1, 5, "nth") == 3
    assert replay.flag("really")
    with pytest.raises(StepNotApplicableError):
        replay.flag("more")
    with pytest.raises(StepNotApplicableError):
        ReplayedDraws(step).choose(["bob"], "which")
    with pytest.raises(StepNotApplicableError):
        ReplayedDraws(step).choose(["ada"], "volume")
    with pytest.raises(StepNotApplicableError):
        ReplayedDraws(Step("x", {}, draws=True, drawn=[("nth", 3)])).number(1, 2, "nth")


def test_failures_are_distinguished_by_their_line() -> None:
    def failure_of(number: int) -> BaseException:
        try:
            assert number < 2
            assert number > 2
        except AssertionError as error:
            return error
        raise ValueError(number)

    assert failure_location(failure_of(0)) == failure_location(failure_of(1))
    assert failure_location(failure_of(0)) != failure_location(failure_of(2))

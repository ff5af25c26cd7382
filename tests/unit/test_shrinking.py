"""How a random sequence that has failed is made shorter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stateful.sequence_shrinker import ReplayedDraws, Step, StepNotApplicableError, failure_location, shrink


def steps(count: int) -> list[Step]:
    """With numbers for names."""
    return [Step(str(number), {}, draws=False) for number in range(count)]


def names(found: Sequence[Step]) -> set[int]:
    """Those numbers."""
    return {int(one.rule) for one in found}


@given(needed=st.sets(st.integers(0, 49), min_size=1, max_size=4))
def test_only_what_is_needed_is_left(needed: set[int]) -> None:
    shrunk = shrink(steps(50), lambda part: needed <= names(part), 60)
    assert shrunk.failed_again
    assert names(shrunk.steps) == needed
    assert shrunk.played < 300
    assert all(f"  {number}()" in str(shrunk) for number in needed)


def test_what_does_not_fail_again_stays_whole() -> None:
    shrunk = shrink(steps(50), lambda _part: False, 60)
    assert not shrunk.failed_again
    assert len(shrunk.steps) == 50
    assert shrunk.played == 1
    assert "depends on timing" in str(shrunk)


def test_it_ends_in_time_with_what_it_has() -> None:
    shrunk = shrink(steps(50), lambda part: 7 in names(part), 0)
    assert shrunk.failed_again
    assert shrunk.played == 1
    assert len(shrunk.steps) == 50


def test_what_was_drawn_is_drawn_again_if_it_can_be_had() -> None:
    step = Step("scale", {"gpus": 1}, draws=True)
    step.drawn += [("which", "'ada'"), ("trouble", "'none'"), ("nth", 3), ("really", 1)]
    assert str(step) == "scale(gpus=1, which=\"'ada'\", trouble=\"'none'\", nth=3, really=1)"
    again = ReplayedDraws(step)
    assert again.choose(["bob", "ada"], "which") == "ada"
    assert again.choose(["kill", "none"], "trouble") == "none"
    assert again.number(1, 5, "nth") == 3
    assert again.flag("really")
    with pytest.raises(StepNotApplicableError):
        again.flag("more")
    with pytest.raises(StepNotApplicableError):
        ReplayedDraws(step).choose(["bob"], "which")
    with pytest.raises(StepNotApplicableError):
        ReplayedDraws(step).choose(["ada"], "volume")
    with pytest.raises(StepNotApplicableError):
        ReplayedDraws(Step("x", {}, draws=True, drawn=[("nth", 3)])).number(1, 2, "nth")


def test_failures_are_told_apart_by_their_line() -> None:
    def failure_of(number: int) -> BaseException:
        try:
            assert number < 2
            assert number > 2
        except AssertionError as error:
            return error
        raise ValueError(number)

    assert failure_location(failure_of(0)) == failure_location(failure_of(1))
    assert failure_location(failure_of(0)) != failure_location(failure_of(2))

"""The rules of what else happens to a host: other daemons, the docker command, and who reads everything."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.stateful.docker_commands import do_outside
from tests.stateful.read_checks import read_everything
from tests.stateful.rule_base import EXITED, RESTING, RUNNING, STOPPED, Drawing, counted
from tests.stateful.sequence_shrinker import Draws


class OtherRules(Drawing):
    """See the module's docstring."""

    @precondition(lambda self: self.news and bool(self.arena.known))
    @rule(kill=st.booleans())
    @counted
    def another_daemon(self, kill: bool) -> None:
        """Killed or stopped, with nothing under way."""
        self.loop.run(self.arena.restart(kill=kill))
        self.loop.run(self.arena.check())
        self.news = False

    @precondition(lambda self: self.has(*RESTING))
    @rule(data=st.data(), deed=st.sampled_from(("rm", "stop", "kill", "pause", "start", "rename", "limit")))
    @counted
    def behind_its_back(self, data: Draws, deed: str) -> None:
        """The docker command does something to one of its containers."""
        states = {"rm": (RUNNING, EXITED), "start": (EXITED, STOPPED), "rename": RESTING}.get(deed, (RUNNING,))
        if not self.has(*states):
            return self.idle()
        one = self.one(data, *states)
        # Not often: what is removed is lost for the rest of the sequence, unless it is rolled back.
        if deed == "rm" and not data.flag("really"):
            return self.idle()
        self.loop.run(do_outside(self.arena, one.name, deed))
        self.tally[f"docker {deed}"] += 1
        return self.loop.run(self.arena.check(one.name))

    # Once is enough: what was looked at is not looked at again before anything else has happened.
    @precondition(lambda self: self.news)
    @rule()
    @counted
    def look_at_everything(self) -> None:
        """Everything agrees, by whichever call it is asked for."""
        self.loop.run(self.arena.check())
        self.loop.run(read_everything(self.arena))
        self.news = False

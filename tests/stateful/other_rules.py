"""Other rules: a successor of the daemon, docker commands, and reads of everything."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.stateful.docker_commands import run_docker_action
from tests.stateful.read_checks import check_all_reads
from tests.stateful.rule_base import EXITED, RESTING, RUNNING, STOPPED, RuleBase, counted
from tests.stateful.sequence_shrinker import Draws


class OtherRules(RuleBase):
    """See the module's docstring."""

    @precondition(lambda self: self.changed_since_check and bool(self.host.containers))
    @rule(kill=st.booleans())
    @counted
    def replace_daemon(self, kill: bool) -> None:
        """Replace the daemon, killed or stopped, while no operation is running."""
        self.loop.run(self.host.restart(kill=kill))
        self.loop.run(self.host.check())
        self.changed_since_check = False

    @precondition(lambda self: self.has_container(*RESTING))
    @rule(data=st.data(), action=st.sampled_from(("rm", "stop", "kill", "pause", "start", "rename", "limit")))
    @counted
    def docker_command(self, data: Draws, action: str) -> None:
        """Change an engine container with the docker command."""
        states = {"rm": (RUNNING, EXITED), "start": (EXITED, STOPPED), "rename": RESTING}.get(action, (RUNNING,))
        if not self.has_container(*states):
            return self.skip()
        container = self.choose_container(data, *states)
        # Remove seldom: a removed container is lost for the rest of the sequence, unless it is rolled back.
        if action == "rm" and not data.flag("really"):
            return self.skip()
        self.loop.run(run_docker_action(self.host, container.name, action))
        self.tally[f"docker {action}"] += 1
        return self.loop.run(self.host.check(container.name))

    # A check need not be repeated before the next change.
    @precondition(lambda self: self.changed_since_check)
    @rule()
    @counted
    def check_everything(self) -> None:
        """Compare everything with the model, by every RPC that reads."""
        self.loop.run(self.host.check())
        self.loop.run(check_all_reads(self.host))
        self.changed_since_check = False

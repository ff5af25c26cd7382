"""Reports the outcomes of the mutants of a group, and a diff of each mutant that no test noticed."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

_EXPLAINED = Path(__file__).with_name("explained.toml")


class Outcome(StrEnum):
    """The outcome of the tests for a mutant. `UNSEEN`: no test runs the function; counted as survived."""

    CAUGHT = "caught"
    TIMED_OUT = "timed out"
    SURVIVED = "survived"
    UNSEEN = "unseen"
    CRASHED = "crashed"
    OPEN = "open"


# Exit codes of pytest and of mutmut, and signals: SIGXCPU at the time limit, SIGKILL if the process did not end then.
# Other codes mean CRASHED.
_OUTCOMES: dict[int | None, Outcome] = {
    None: Outcome.OPEN,
    2: Outcome.OPEN,
    0: Outcome.SURVIVED,
    1: Outcome.CAUGHT,
    3: Outcome.CAUGHT,
    5: Outcome.UNSEEN,
    33: Outcome.UNSEEN,
    36: Outcome.TIMED_OUT,
    24: Outcome.TIMED_OUT,
    -24: Outcome.TIMED_OUT,
    -9: Outcome.TIMED_OUT,
    152: Outcome.TIMED_OUT,
    # The tests could not be collected.
    255: Outcome.CAUGHT,
}
_NOTICED = (Outcome.CAUGHT, Outcome.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed function. `removed` and `added` are the different lines, without indentation."""

    name: str
    function: str
    outcome: Outcome
    removed: str
    added: str
    context: str

    @property
    def key(self) -> tuple[str, str, str]:
        """The identity of a mutant in explained.toml."""
        return self.function, self.removed, self.added


def read_mutants(folder: Path) -> list[Mutant]:
    """All mutants of the group in this folder, with what is known of them."""
    found: list[Mutant] = []
    for meta in sorted((folder / "mutants").rglob("*.py.meta")):
        module = meta.with_suffix("")
        codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
        spans = json.loads(module.with_suffix(".py.spans").read_text())["spans"] if codes else {}
        lines = module.read_text().splitlines()
        for name, code in codes.items():
            generated = name.rpartition(".")[2]
            mangled = generated.partition("__mutmut_")[0]
            first, last = spans[f"{mangled}__mutmut_orig"]
            original = lines[first - 1 : last]
            first, last = spans[generated]
            mutated = [line.replace(generated, f"{mangled}__mutmut_orig") for line in lines[first - 1 : last]]
            changes = list(difflib.unified_diff(original, mutated, n=2, lineterm=""))[2:]
            found.append(
                Mutant(
                    name=name,
                    function=f"{name.rpartition('.')[0]}:{mangled[1:].strip('ǁ_').replace('ǁ', '.')}",
                    outcome=_OUTCOMES.get(code, Outcome.CRASHED),
                    removed="\n".join(line[1:].strip() for line in changes if line.startswith("-")),
                    added="\n".join(line[1:].strip() for line in changes if line.startswith("+")),
                    context="\n".join(line for line in changes if not line.startswith("@@")),
                )
            )
    return found


def forget(folder: Path, names: Container[str]) -> None:
    """Remove the recorded outcomes of the mutants with these `names`."""
    for meta in (folder / "mutants").rglob("*.py.meta"):
        content = json.loads(meta.read_text())
        codes: dict[str, int | None] = content["exit_code_by_key"]
        content["exit_code_by_key"] = {name: None if name in names else code for name, code in codes.items()}
        if content["exit_code_by_key"] != codes:
            meta.write_text(json.dumps(content, indent=4))


def write_report(
    group: str, mutants: Sequence[Mutant], chosen: Sequence[Mutant], minimum: int
) -> tuple[str, list[str]]:
    """Return a report on a group, of which the `chosen` mutants were tried, and the problems.

    Problems are a share of caught mutants below `minimum` percent, and explanations without a mutant.
    """
    entries: list[dict[str, Any]] = tomllib.loads(_EXPLAINED.read_text()).get("explained", [])
    reasons = {
        (entry["function"], entry["removed"].strip(), entry["added"].strip()): entry["reason"]
        for entry in entries
        if entry["group"] == group
    }
    problems = [
        f"{group}: explained.toml has a mutant of {key[0]} that does not exist:\n- {key[1]}\n+ {key[2]}"
        for key in reasons.keys() - {mutant.key for mutant in mutants}
    ]
    tried = [mutant for mutant in chosen if mutant.outcome is not Outcome.OPEN]
    numbers = Counter(mutant.outcome for mutant in tried)
    survivors = [mutant for mutant in tried if mutant.outcome not in _NOTICED]
    explained = [mutant for mutant in survivors if mutant.key in reasons]
    counted = len(tried) - len(explained)
    percent = 100 * sum(numbers[outcome] for outcome in _NOTICED) / counted if counted else 100.0
    share = f"{percent:.1f} % caught" if tried else "nothing tried"
    if percent < minimum or (minimum and not tried):
        problems.append(f"{group}: {share}; at least {minimum} % of the mutants must be caught")
    head = (
        f"{group}: {len(mutants)} mutants, {len(tried)} of {len(chosen)} chosen ones tried: {numbers[Outcome.CAUGHT]} "
        f"caught, {numbers[Outcome.TIMED_OUT]} timed out, {numbers[Outcome.SURVIVED]} survived, "
        f"{numbers[Outcome.UNSEEN]} run by no test, {numbers[Outcome.CRASHED]} crashed; {len(explained)} of these "
        f"explained and left out; {share}"
    )
    parts = [head, ""]
    for mutant in sorted(survivors, key=lambda mutant: (mutant.key in reasons, mutant.function)):
        parts += [f"{mutant.outcome}: {mutant.name}", mutant.context]
        if mutant.key in reasons:
            parts.append(f"  explained: {reasons[mutant.key]}")
        parts.append("")
    return "\n".join(parts), problems

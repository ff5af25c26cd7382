"""What a room's mutants came to, and those of them that no test noticed, each as a difference."""

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


class Verdict(StrEnum):
    """What the tests said of a mutant. `UNSEEN`: no test runs the function; counted with those that survived."""

    CAUGHT = "caught"
    TIMED_OUT = "timed out"
    SURVIVED = "survived"
    UNSEEN = "unseen"
    CRASHED = "crashed"
    OPEN = "open"


# pytest's exit codes, mutmut's own, and signals: SIGXCPU when its time is over, SIGKILL where that was no end.
# Others were not foreseen.
_VERDICTS: dict[int | None, Verdict] = {
    None: Verdict.OPEN,
    2: Verdict.OPEN,
    0: Verdict.SURVIVED,
    1: Verdict.CAUGHT,
    3: Verdict.CAUGHT,
    5: Verdict.UNSEEN,
    33: Verdict.UNSEEN,
    36: Verdict.TIMED_OUT,
    24: Verdict.TIMED_OUT,
    -24: Verdict.TIMED_OUT,
    -9: Verdict.TIMED_OUT,
    152: Verdict.TIMED_OUT,
    # Its tests could not even be collected.
    255: Verdict.CAUGHT,
}
_NOTICED = (Verdict.CAUGHT, Verdict.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed function. `removed` and `added` are the lines that differ, without indentation."""

    name: str
    function: str
    verdict: Verdict
    removed: str
    added: str
    context: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What an explanation names."""
        return self.function, self.removed, self.added


def read_mutants(folder: Path) -> list[Mutant]:
    """All mutants of the room in this folder, with what is known of them."""
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
                    verdict=_VERDICTS.get(code, Verdict.CRASHED),
                    removed="\n".join(line[1:].strip() for line in changes if line.startswith("-")),
                    added="\n".join(line[1:].strip() for line in changes if line.startswith("+")),
                    context="\n".join(line for line in changes if not line.startswith("@@")),
                )
            )
    return found


def forget(folder: Path, names: Container[str]) -> None:
    """Have no verdict on the mutants of these `names`."""
    for meta in (folder / "mutants").rglob("*.py.meta"):
        content = json.loads(meta.read_text())
        codes: dict[str, int | None] = content["exit_code_by_key"]
        content["exit_code_by_key"] = {name: None if name in names else code for name, code in codes.items()}
        if content["exit_code_by_key"] != codes:
            meta.write_text(json.dumps(content, indent=4))


def write_report(room: str, mutants: Sequence[Mutant], chosen: Sequence[Mutant], minimum: int) -> tuple[str, list[str]]:
    """A report on a room, of which those `chosen` were tried, and what is wrong.

    Wrong are a share of mutants that were caught below `minimum` percent, and explanations without a mutant.
    """
    entries: list[dict[str, Any]] = tomllib.loads(_EXPLAINED.read_text()).get("explained", [])
    reasons = {
        (entry["function"], entry["removed"].strip(), entry["added"].strip()): entry["reason"]
        for entry in entries
        if entry["room"] == room
    }
    problems = [
        f"{room}: explained.toml has a mutant of {key[0]} that does not exist:\n- {key[1]}\n+ {key[2]}"
        for key in reasons.keys() - {mutant.key for mutant in mutants}
    ]
    tried = [mutant for mutant in chosen if mutant.verdict is not Verdict.OPEN]
    numbers = Counter(mutant.verdict for mutant in tried)
    survivors = [mutant for mutant in tried if mutant.verdict not in _NOTICED]
    explained = [mutant for mutant in survivors if mutant.key in reasons]
    counted = len(tried) - len(explained)
    percent = 100 * sum(numbers[verdict] for verdict in _NOTICED) / counted if counted else 100.0
    share = f"{percent:.1f} % caught" if tried else "nothing tried"
    if percent < minimum or (minimum and not tried):
        problems.append(f"{room}: {share}; at least {minimum} % of the mutants must be caught")
    head = (
        f"{room}: {len(mutants)} mutants, {len(tried)} of {len(chosen)} chosen ones tried: {numbers[Verdict.CAUGHT]} "
        f"caught, {numbers[Verdict.TIMED_OUT]} timed out, {numbers[Verdict.SURVIVED]} survived, "
        f"{numbers[Verdict.UNSEEN]} run by no test, {numbers[Verdict.CRASHED]} crashed; {len(explained)} of these "
        f"explained and left out; {share}"
    )
    parts = [head, ""]
    for mutant in sorted(survivors, key=lambda mutant: (mutant.key in reasons, mutant.function)):
        parts += [f"{mutant.verdict}: {mutant.name}", mutant.context]
        if mutant.key in reasons:
            parts.append(f"  explained: {reasons[mutant.key]}")
        parts.append("")
    return "\n".join(parts), problems

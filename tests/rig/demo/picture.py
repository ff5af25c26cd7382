"""`python -m tests.rig.demo.picture FILE`: draw a part of the demo's output as SVG, for README.md.

Three dots mark omitted lines; empty lines are removed. The other lines are unchanged.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from tests.rig.rig import REPOSITORY

_DEADLINE_S = 600.0
# The commands that are drawn, with their output, by the number of the step.
_SHOWN = {
    1: ("gpudock create", "gpudock gpus"),
    2: ("gpudock exec",),
    4: ("gpudock scale", "gpudock gpus"),
}
_STEP = re.compile(r"── (\d+)\. ")
# A page that shows an SVG as a picture does not load web fonts, and any monospace font is right.
_WEB_FONT = re.compile(r"@font-face {.*?}\s*", re.DOTALL)


def main() -> int:
    """Run the demo, and write the picture if it succeeds. Returns the exit code of the demo."""
    environment = os.environ | {"FORCE_COLOR": "1"}
    environment.pop("NO_COLOR", None)
    demo = subprocess.run(
        [sys.executable, "-m", "tests.rig.demo"],
        check=False,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_DEADLINE_S,
    )
    if demo.returncode:
        sys.stderr.write(demo.stdout)
    else:
        Path(sys.argv[1]).write_text(svg(drawn_lines(demo.stdout)), encoding="utf-8")
    return demo.returncode


def drawn_lines(output: str) -> list[Text]:
    """The lines of the demo's output that are drawn, with their colours."""
    return list(_select(list(Text.from_ansi(output).split("\n", allow_blank=True))))


def _select(lines: list[Text]) -> Iterator[Text]:
    step, shown, left_out = 0, False, False
    for line in lines:
        if found := _STEP.match(line.plain):
            step = int(found[1])
            shown = step in _SHOWN
        elif line.plain.startswith("$ "):
            shown = line.plain.removeprefix("$ ").startswith(_SHOWN.get(step, ()))
        elif line.plain.startswith("✓ "):
            shown = step in _SHOWN
        elif not line.plain:
            continue
        if not shown:
            left_out = left_out or step > 0
            continue
        if left_out:
            yield Text("⋮", style="dim")
            left_out = False
        if found and step > 1:
            yield Text()
        yield line


def svg(lines: list[Text]) -> str:
    """The SVG of these lines."""
    width = max(line.cell_len for line in lines) + 1
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    for line in lines:
        console.print(line, soft_wrap=True)
    return _WEB_FONT.sub("", console.export_svg(title="make demo", theme=DIMMED_MONOKAI, unique_id="demo"))


if __name__ == "__main__":
    sys.exit(main())

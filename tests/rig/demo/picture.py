"""The picture in README.md: `python -m tests.rig.demo.picture FILE` draws a part of the demo's output as SVG.

Three dots stand for what is left out, and empty lines go; nothing else of the output is changed.
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
# The commands that are shown, with their output, by the number of their step.
_SHOWN = {
    1: ("gpudock create", "gpudock gpus"),
    2: ("gpudock exec",),
    4: ("gpudock scale", "gpudock gpus"),
}
_STEP = re.compile(r"── (\d+)\. ")
# Fonts of the web are not loaded by pages that show an SVG as a picture, nor needed: any monospace font will do.
_WEB_FONT = re.compile(r"@font-face {.*?}\s*", re.DOTALL)


def main() -> int:
    """Returns the demo's exit code; writes the picture if that is 0."""
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
        Path(sys.argv[1]).write_text(drawn(shown_part(demo.stdout)), encoding="utf-8")
    return demo.returncode


def shown_part(said: str) -> list[Text]:
    """The lines of the demo's output that are drawn, in their colours."""
    return list(_shown_lines(list(Text.from_ansi(said).split("\n", allow_blank=True))))


def _shown_lines(lines: list[Text]) -> Iterator[Text]:
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


def drawn(lines: list[Text]) -> str:
    """The SVG."""
    width = max(line.cell_len for line in lines) + 1
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    for line in lines:
        console.print(line, soft_wrap=True)
    return _WEB_FONT.sub("", console.export_svg(title="make demo", theme=DIMMED_MONOKAI, unique_id="demo"))


if __name__ == "__main__":
    sys.exit(main())

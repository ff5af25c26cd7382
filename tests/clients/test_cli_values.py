"""Numbers, sizes, times, ports and mounts in arguments of the command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner
from gpudock.cli import main
from gpudock.cli._arguments import (
    REVISION_NUMBER,
    Bind,
    Decimal,
    Port,
    Restart,
    Size,
    TextParameter,
    TimeSpan,
    Tmpfs,
    WholeNumber,
)

GOOD: list[tuple[TextParameter[Any], str, Any]] = [
    (Size(), "8G", 8 * 2**30),
    (Size(), "512MiB", 512 * 2**20),
    (Size(), "1.5k", 1536),
    (Size(), "8GB", 8 * 2**30),
    (Size(), "64mb", 67_108_864),
    (Size(), "64MiB", 67_108_864),
    (Size(), "64m", 67_108_864),
    (Size(), "2kb", 2048),
    (Size(), "1t", 2**40),
    (Size(), "1PiB", 2**50),
    (Size(), "8 G", 8 * 2**30),
    (Size(), "0.3k", 307),
    (Size(), "0", 0),
    (Size(), "100b", 100),
    (WholeNumber(), "0", 0),
    (WholeNumber(), "007", 7),
    (WholeNumber(), "2147483647", 2**31 - 1),
    (REVISION_NUMBER, "9223372036854775807", 2**63 - 1),
    (Decimal(), "1.5", 1.5),
    (Decimal(), ".5", 0.5),
    (Decimal(), "2", 2.0),
    (TimeSpan(), "1.5m", 90.0),
    (TimeSpan(), "500ms", 0.5),
    (TimeSpan(), "0", 0.0),
]
BAD: list[tuple[TextParameter[Any], str]] = [
    *(
        (Size(), text)
        for text in ("", "G", "8  G", " 8G", "-1G", "8Gi", "8GG", "1e9", "0x10", "0.3", "٨G", "99999999T", "1.", "+1")
    ),
    *((TimeSpan(), text) for text in ("", "s", "-1s", "+1s", "1w", "1s2", "1e9", "999999d", "9" * 400)),
    *((WholeNumber(), text) for text in ("", "+1", "-1", "1.0", "1e3", "1_000", "٣", "3000000000", "9" * 5000, "all")),
    *((REVISION_NUMBER, text) for text in ("0", "-1", "+1", "9223372036854775808")),
    *((Decimal(), text) for text in ("", "+1", "-0.5", "nan", "inf", "1e3", "1_0", ".", "1.")),
    *((Port(), text) for text in ("", "0", "0:80", "80:0", "65536", "80:80:80", "80/sctp", "a", "80/", ":80", "-80")),
    *((Bind(), text) for text in ("", "data", ":/data", "data:", "data:/data:rx", "a:b:c:d")),
    *((Tmpfs(), text) for text in ("/x:", "/x:big")),
    *((Restart(), text) for text in ("", "sometimes", "always:3", "on-failure:", "on-failure:-1", "on-failure:x")),
]


@pytest.mark.parametrize(("kind", "text", "value"), GOOD)
def test_values_are_read(kind: TextParameter[Any], text: str, value: object) -> None:
    read = kind.convert(text, None, None)
    assert (read.total_seconds() if isinstance(kind, TimeSpan) else read) == value


@pytest.mark.parametrize(("kind", "text"), BAD)
def test_bad_values_are_usage_errors(kind: TextParameter[Any], text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)


SIGNED = (
    "scale c --gpus",
    "scale c --cpus",
    "scale c --memory",
    "scale c --shm-size",
    "start c --gpus",
    "create c i --gpus",
    "create c i --cpus",
    "create c i --memory",
    "create c i --gpus 1 --gpu-memory",
    "create c i --keep-revisions",
    "create c i --keep-for",
    "create c i --pull-stall-timeout",
    "update c --pull-stall-timeout",
    "update c --gpus",
    "update c --cpus",
    "clone c d --revision",
    "rollback c",
    "revision get c",
    "revision delete c",
    "volume create v",
    "volume resize v",
    "stop c --timeout",
    "exec --timeout",
)


@pytest.mark.parametrize("words", SIGNED)
@pytest.mark.parametrize("number", ["+1", "-1"])
def test_a_number_with_a_sign_is_refused(words: str, number: str) -> None:
    """`scale --gpus +1` would set one GPU, also for a container that has two."""
    # After `--`, so that a positional -1 is not read as an option.
    value = ["--", number] if words.rsplit(maxsplit=1)[-1] in {"c", "v"} else [number]
    result = CliRunner().invoke(main, ["--address", "/nowhere", *words.split(), *value])
    assert result.exit_code == 2, result.output
    assert f"'{number}' has a sign; give the absolute value" in result.output


def _options(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Parameter]]:
    """Return all options and arguments of a command and of its subcommands."""
    for parameter in command.params:
        yield f"{path} {parameter.opts[0]}", parameter
    if isinstance(command, click.Group):
        for name, subcommand in command.commands.items():
            yield from _options(subcommand, f"{path} {name}")


def test_no_number_uses_a_type_of_click_which_accepts_a_sign() -> None:
    numbers = (click.types.IntParamType, click.types.FloatParamType, click.IntRange, click.FloatRange)
    options = list(_options(main))
    assert len(options) > 100
    assert [name for name, parameter in options if isinstance(parameter.type, numbers)] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "c", "i", "--pull-stall-timeout", "0"], "'0' is too small; give a number above 0"),
        (["create", "c", "i", "--restart", "on-failure:+3"], "'+3' is not a count; give digits alone"),
        (["create", "c", "i", "--restart", "always:3"], "only on-failure takes a count"),
        (["update", "c", "--env-rm", "B=2"], "'B=2' is not a name; give the name alone"),
        (["update", "c", "--env-rm", ""], "'' is not a name"),
        (["update", "c", "--label-rm", "team=x"], "'team=x' is not a name"),
    ],
)
def test_meaningless_values_are_refused_without_a_call(words: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["--address", "/nowhere", *words])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_a_value_out_of_range_is_refused_with_the_range() -> None:
    result = CliRunner().invoke(main, ["create", "c", "i", "--gpus", "3000000000"])
    assert "3000000000 is out of range: the number must be 0 to 2147483647" in result.output
    assert "the number must be 1 to" in CliRunner().invoke(main, ["rollback", "c", "0"]).output
    assert "2147483647" not in CliRunner().invoke(main, ["create", "--help"]).output

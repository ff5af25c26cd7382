"""Minimum versions of programs of the host, checked once when the daemon starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import structlog

from gpudock_server.adapters.host.subprocesses import ProgramFailed, mark_unusable, missing_programs, run

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_NUMBERS: Final = re.compile(r"\bv?(\d+(?:\.\d+)+)")
_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class ProgramRequirement:
    """A program, its version option, the minimum version, and the feature that this version introduced."""

    program: str
    option: str
    oldest: tuple[int, ...]
    feature: str


REQUIREMENTS: Final = (
    ProgramRequirement("setpriv", "--version", (2, 33), "--pdeathsig"),
    ProgramRequirement("unshare", "--version", (2, 26), "--propagation"),
    ProgramRequirement("losetup", "--version", (2, 29), "--nooverlap"),
    ProgramRequirement("findmnt", "--version", (2, 27), "--json"),
    ProgramRequirement("mkfs.xfs", "-V", (4, 9), "reflinks and project quotas that were tried with it"),
    ProgramRequirement("xfs_quota", "-V", (4, 9), "project quotas that were tried with it"),
    ProgramRequirement("mkfs.btrfs", "--version", (4, 4), "profiles that were tried with it"),
    ProgramRequirement("mkfs.ext4", "-V", (1, 43), "checksums of metadata"),
)


async def check_versions() -> tuple[str, ...]:
    """Log a warning for each program that is too old, treat it as missing from now on, and return the reasons.

    A program that does not print its version is accepted.
    """
    found = []
    for requirement in REQUIREMENTS:
        if missing_programs(requirement.program):
            continue
        version = await _version(requirement)
        if version and version < requirement.oldest:
            shown, oldest = (".".join(map(str, numbers)) for numbers in (version, requirement.oldest))
            found.append(
                f"{requirement.program} {shown} is too old; {oldest} or later is required ({requirement.feature})"
            )
            mark_unusable(requirement.program, found[-1])
            log.warning("host program too old", program=requirement.program, version=shown, oldest=oldest)
    return tuple(found)


async def _version(requirement: ProgramRequirement) -> tuple[int, ...]:
    try:
        printed = await run(requirement.program, requirement.option, seconds=_SECONDS, include_stderr=True)
    except (ProgramFailed, OSError):
        return ()
    found = _NUMBERS.search(printed)
    return tuple(int(number) for number in found[1].split(".")) if found else ()

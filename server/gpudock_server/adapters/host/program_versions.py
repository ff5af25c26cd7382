"""The oldest versions of the host's programs that do what is asked of them here, checked once at the daemon's start."""

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
    """A program, the option that prints its version, the oldest version that will do, and what that one brought."""

    program: str
    option: str
    oldest: tuple[int, ...]
    brought: str


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
    """Log a warning for each program that is too old, have it count as missing from now on, and return the reasons.

    A program that does not tell its version is taken as it is.
    """
    found = []
    for one in REQUIREMENTS:
        if missing_programs(one.program):
            continue
        version = await _version(one)
        if version and version < one.oldest:
            shown, oldest = (".".join(map(str, numbers)) for numbers in (version, one.oldest))
            found.append(f"{one.program} {shown} is too old, {oldest} or later is needed ({one.brought})")
            mark_unusable(one.program, found[-1])
            log.warning("program is too old", program=one.program, version=shown, oldest=oldest)
    return tuple(found)


async def _version(requirement: ProgramRequirement) -> tuple[int, ...]:
    try:
        printed = await run(requirement.program, requirement.option, seconds=_SECONDS, include_stderr=True)
    except (ProgramFailed, OSError):
        return ()
    found = _NUMBERS.search(printed)
    return tuple(int(number) for number in found[1].split(".")) if found else ()

"""Numbers of Linux signals, which containers use also where this client does not run on Linux (signal(7))."""

from __future__ import annotations

_NAMES = """
    HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG
    XCPU XFSZ VTALRM PROF WINCH IO PWR SYS
""".split()  # noqa: SIM905 - as a literal list it is a screen long
_NUMBERS = {name: number for number, name in enumerate(_NAMES, start=1)} | {"POLL": 29, "RTMIN": 34, "RTMAX": 64}
_UNKNOWN = 127


def signal_number(name: str) -> int:
    """Return the number of a signal such as `SIGTERM` or `SIGRTMIN+3`; 127, which is no signal, for an unknown name."""
    for sign in "+-":
        base, found, offset = name.partition(sign)
        if found and offset.isdecimal():
            return signal_number(base) + int(sign + offset)
    return _NUMBERS.get(name.removeprefix("SIG"), _UNKNOWN)

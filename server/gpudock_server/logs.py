"""Logging: one line per event, on stderr, as JSON or for a terminal, with what the event belongs to.

Bind what the lines of a task have in common with `structlog.contextvars.bind_contextvars`: `rpc`, `caller_kind`,
`caller`, `container`, `operation_id`; tasks that it starts inherit them. Secrets should never get this far:
settings hold their paths only, and records that carry one keep it out of their repr. `redact_secrets` is the net below
that, for what a library or a hurried line hands over. Tracebacks are printed without the values of local variables for
the same reason.
"""

from __future__ import annotations

import logging
import re
import sys
import uuid
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_LONGEST_TEXT = 256
# Names from the token file or a certificate: never secret, and what the audit is for.
_NEVER_SECRET = frozenset({"caller", "caller_kind"})
_REDACTED = "[redacted]"
_SECRET_WORDS = r"authorization|passw(?:or)?d|secret|token|registry[-_]auth|private[-_]key"  # noqa: S105 - what they are called
_SECRET_KEY = re.compile(rf"(?:{_SECRET_WORDS})$", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?P<before>"
    # `password=…`, `"X-Registry-Auth": "…"`, `authorization: Bearer …`
    rf"(?:{_SECRET_WORDS})['\"]?\s*[:=]\s*['\"]?(?:bearer\s+|basic\s+)?"
    r"|\bbearer\s+"
    r")[^\s'\",;]+",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"(?P<before>://[^/\s:@]*:)[^/\s@]+(?=@)")

# They report every connection and every retry at INFO, which is our DEBUG.
_NOISY_LOGGERS = ("aiohttp", "asyncio", "grpc")


def truncate(text: str) -> str:
    """At most 256 bytes of what a caller sent, which may be long and is logged before it is validated."""
    encoded = text.encode(errors="replace")
    return text if len(encoded) <= _LONGEST_TEXT else f"{encoded[:_LONGEST_TEXT].decode(errors='ignore')}…"


def new_error_id() -> str:
    """An id that stands both in the log and in what a caller is told."""
    return uuid.uuid4().hex[:12]


def configure(log_format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send everything that structlog and the standard library log to `stream` (stderr), from `level` up.

    `auto` is `console` on a terminal and `json` elsewhere. May be called again; the last call counts.
    """
    stream = stream or sys.stderr
    console = log_format == "console" or (log_format == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # A logger that was used before this call must not keep what was configured then.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                redact_secrets,
                _console_renderer(stream) if console else structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    logging.captureWarnings(capture=True)


def redact_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor that takes out values whose key or whose text gives them away."""
    return {key: value if key in _NEVER_SECRET else _redacted(key, value) for key, value in event.items()}


def _console_renderer(stream: TextIO) -> Processor:
    # plain_traceback: the pretty ones print local variables.
    return structlog.dev.ConsoleRenderer(
        colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
    )


def _redacted(key: str, value: Any) -> Any:  # noqa: ANN401 - whatever somebody logs
    if value and _SECRET_KEY.search(key):
        return _REDACTED
    match value:
        case str():
            value = _SECRET_TEXT.sub(rf"\g<before>{_REDACTED}", value)
            return _URL_PASSWORD.sub(rf"\g<before>{_REDACTED}", value)
        case dict():
            return {name: _redacted(str(name), item) for name, item in value.items()}
        case list() | tuple():
            return [_redacted("", item) for item in value]
        case _:
            return value

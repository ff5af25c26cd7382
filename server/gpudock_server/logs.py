"""Logging: one line per event on stderr, as JSON or for a terminal.

Fields that all lines of a task share (`rpc`, `caller_kind`, `caller`, `container`, `operation_id`) are bound with
`structlog.contextvars.bind_contextvars`; child tasks inherit them. Secrets are kept out of events: settings hold only
the paths of secrets, and records that carry one exclude it from their repr. `redact_secrets` removes those that a
library or a mistake logs anyway. For the same reason tracebacks are printed without the values of local variables.
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
# Names from the token file or a certificate: they are not secret, and the audit log needs them.
_NEVER_SECRET = frozenset({"caller", "caller_kind"})
_REDACTED = "[redacted]"
_SECRET_WORDS = r"authorization|passw(?:or)?d|secret|token|registry[-_]auth|private[-_]key"  # noqa: S105 - names of secrets, not values
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

# These log every connection and every retry at INFO; the daemon shows such lines at DEBUG only.
_NOISY_LOGGERS = ("aiohttp", "asyncio", "grpc")


def truncate(text: str) -> str:
    """Cut a text to 256 bytes. For texts of callers, which are logged before they are validated."""
    encoded = text.encode(errors="replace")
    return text if len(encoded) <= _LONGEST_TEXT else f"{encoded[:_LONGEST_TEXT].decode(errors='ignore')}…"


def new_error_id() -> str:
    """Return a new id that appears both in the log and in the error that the caller gets."""
    return uuid.uuid4().hex[:12]


def configure(log_format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Write all events of structlog and the standard library from `level` up to `stream` (default: stderr).

    `auto` means `console` on a terminal and `json` elsewhere. May be called again; the last call counts.
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
        # Loggers that were used before this call must use the new configuration.
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
    """Structlog processor: replace values that are secrets according to their key or their text."""
    return {key: value if key in _NEVER_SECRET else _redacted(key, value) for key, value in event.items()}


def _console_renderer(stream: TextIO) -> Processor:
    # plain_traceback: the other formatters print local variables.
    return structlog.dev.ConsoleRenderer(
        colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
    )


def _redacted(key: str, value: Any) -> Any:  # noqa: ANN401 - events may have values of any type
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

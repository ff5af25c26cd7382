"""What a log line contains, and which secrets are redacted."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import structlog
from gpudock_server.errors import Unauthenticated
from gpudock_server.logs import LogFormat, LogLevel, configure, new_error_id
from gpudock_server.rpc.middleware.identity import IdentityInterceptor
from typing_extensions import override

SECRET = "hunter2-hunter2"  # noqa: S105 - a test secret


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, show = root.handlers, root.level, warnings.showwarning
    yield
    logging.captureWarnings(capture=False)
    root.handlers, warnings.showwarning = handlers, show
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    @override
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def configure_logs(log_format: LogFormat = "json", level: LogLevel = "info") -> io.StringIO:
    stream = io.StringIO()
    configure(log_format, level, stream)
    return stream


def test_a_line_is_json_with_the_context_of_its_task() -> None:
    stream = configure_logs()
    structlog.contextvars.bind_contextvars(rpc="/a/B", caller="unix", operation_id="7", container="train")
    structlog.stdlib.get_logger("gpudock.core").info("step done", step="claim")
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "step done",
        "level": "info",
        "logger": "gpudock.core",
        "step": "claim",
        "rpc": "/a/B",
        "caller": "unix",
        "operation_id": "7",
        "container": "train",
    }


def test_the_caller_is_not_redacted() -> None:
    stream = configure_logs()
    structlog.contextvars.bind_contextvars(caller_kind="token", caller="deploy-token:prod")
    structlog.stdlib.get_logger("gpudock.audit").info("call", note="token:0123456789")
    (line,) = lines(stream)
    assert (line["caller_kind"], line["caller"], line["note"]) == ("token", "deploy-token:prod", "token:[redacted]")


def test_lines_of_the_standard_library_have_the_same_form() -> None:
    stream = configure_logs()
    structlog.contextvars.bind_contextvars(container="train")
    logging.getLogger("aiodocker").warning("lost %s", "events", extra={"attempt": 2})
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["attempt"], line["container"]) == (
        "lost events",
        "aiodocker",
        2,
        "train",
    )


def test_lines_below_the_level_are_dropped() -> None:
    stream = configure_logs(level="info")
    structlog.stdlib.get_logger("gpudock").debug("no")
    logging.getLogger("asyncio").info("no")
    logging.getLogger("gpudock").info("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]
    stream = configure_logs(level="debug")
    logging.getLogger("asyncio").info("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_auto_is_text_on_a_terminal_and_json_elsewhere() -> None:
    terminal = Terminal()
    configure("auto", "info", terminal)
    structlog.stdlib.get_logger("gpudock").info("hello", n=1)
    assert "hello" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")
    stream = configure_logs("auto")
    structlog.stdlib.get_logger("gpudock").info("hello")
    assert lines(stream)[0]["event"] == "hello"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_values_of_variables(log_format: LogFormat) -> None:
    stream = configure_logs(log_format)

    def connect(password: str) -> None:
        raise ConnectionError(f"refused, {len(password)} characters")

    try:
        connect(SECRET)
    except ConnectionError:
        structlog.stdlib.get_logger("gpudock").exception("failed", error_id=new_error_id())
        logging.getLogger("library").exception("failed")
    text = stream.getvalue()
    assert text.count("ConnectionError: refused, 15 characters") == 2
    assert text.count("Traceback") == 2
    assert SECRET not in text


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secrets_are_redacted(log_format: LogFormat) -> None:
    stream = configure_logs(log_format)
    log = structlog.stdlib.get_logger("gpudock")
    log.info("keys", password=SECRET, token=SECRET, etcd_password=SECRET, headers={"X-Registry-Auth": SECRET})
    log.info("nested", calls=[{"headers": ({"Authorization": SECRET},)}])
    log.info("text authorization: Bearer %s", SECRET, detail=f"tcp://user:{SECRET}@registry:5000/v2")
    log.info("repr", error=repr({"identity_token": SECRET, "username": "ci"}))
    logging.getLogger("aiohttp").warning("sent %s", {"X-Registry-Auth": SECRET})
    try:
        int(f"bad header Bearer {SECRET}")
    except ValueError:
        log.exception("failed")
    text = stream.getvalue()
    assert SECRET not in text
    assert "registry:5000/v2" in text
    assert "username" in text


def test_the_hint_of_a_refused_call_is_not_redacted() -> None:
    """The message names the form of a token, which must not count as one."""
    caller = Mock(**{"peer.return_value": "ipv4:127.0.0.1:1", "auth_context.return_value": {}})
    for header in ((), (("authorization", "Basic YTpi"),)):
        caller.invocation_metadata.return_value = header
        with pytest.raises(Unauthenticated) as refused:
            IdentityInterceptor(None)._identify(caller)
        stream = configure_logs()
        structlog.stdlib.get_logger().warning("authentication failed", reason=refused.value.message)
        (line,) = lines(stream)
        assert line["reason"] == refused.value.message
        assert "`Bearer` and a token" in refused.value.message


def test_paths_of_secrets_are_not_redacted() -> None:
    stream = configure_logs()
    structlog.stdlib.get_logger("gpudock").info("settings", path="/etc/gpudock/tokens", tokens=3, token_file="/t")  # noqa: S106 - a path
    (line,) = lines(stream)
    assert (line["path"], line["tokens"], line["token_file"]) == ("/etc/gpudock/tokens", 3, "/t")


def test_error_ids_are_short_and_unique() -> None:
    ids = {new_error_id() for _ in range(100)}
    assert len(ids) == 100
    assert {len(error_id) for error_id in ids} == {12}

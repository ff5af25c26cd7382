"""Checks a CommitContainerRequest: the name of the image, and the Dockerfile instructions in `changes`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping

from gpudock.v1 import container_service_pb2

from gpudock_server.core.containers.commands import Commit
from gpudock_server.model.engine import RESERVED_LABEL_PREFIX
from gpudock_server.model.image_reference import is_repository, is_tag
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations

_MAX_REPOSITORY = 255
_MAX_AUTHOR_BYTES = 256
_MAX_COMMENT_BYTES = 1024
_MAX_CHANGES = 64
_MAX_CHANGE_BYTES = 4096
# Names of the temporary images of operations.
_RESERVED_REPOSITORIES = frozenset({"gpudock/layer", "gpudock/raw", "gpudock/commit"})

_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(?:tcp|udp|sctp))?", re.ASCII | re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def commit(request: container_service_pb2.CommitContainerRequest) -> Commit:
    """Convert a CommitContainerRequest."""
    violations = fields.check_mutation(request)
    _repository(violations, request.repository)
    if request.tag and not is_tag(request.tag):
        violations.add("tag", "must match ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    fields.text(violations, "author", request.author, max_bytes=_MAX_AUTHOR_BYTES)
    fields.text(violations, "comment", request.comment, max_bytes=_MAX_COMMENT_BYTES)
    command = Commit(
        name=request.name,
        reference=f"{request.repository}:{request.tag or 'latest'}",
        author=request.author,
        comment=request.comment,
        changes=_changes(violations, request.changes),
        pause=request.pause if request.HasField("pause") else True,
        replace=request.replace,
        etag=request.etag,
    )
    violations.raise_if_any()
    return command


def _repository(violations: Violations, value: str) -> None:
    if not value:
        violations.add("repository", "is required")
    elif len(value) > _MAX_REPOSITORY:
        violations.add("repository", f"must have at most {_MAX_REPOSITORY} characters")
    elif not is_repository(value):
        violations.add("repository", "must be a lower-case image name without a tag, such as team/model")
    elif value in _RESERVED_REPOSITORIES:
        violations.add("repository", "is reserved")


def _changes(violations: Violations, lines: Iterable[str]) -> tuple[str, ...]:
    found = tuple(lines)
    if len(found) > _MAX_CHANGES:
        violations.add("changes", f"must have at most {_MAX_CHANGES} entries")
        return ()
    for index, line in enumerate(found):
        if wrong := _line_violation(line):
            violations.add("changes", wrong, index)
    return tuple(line.strip() for line in found)


def _line_violation(line: str) -> str:
    """What is wrong with a line; empty if it is valid."""
    if len(line.encode()) > _MAX_CHANGE_BYTES:
        return f"must have at most {_MAX_CHANGE_BYTES} bytes"
    if not line.isprintable() or line.rstrip().endswith("\\"):
        return "must be one line of printable characters, without a backslash at its end"
    instruction, _, rest = line.strip().partition(" ")
    rule = _RULES.get(instruction.upper())
    if rule is None:
        return f"must start with one of {', '.join(_RULES)}"
    return rule(rest.strip()) if rest.strip() else f"{instruction.upper()} needs an argument"


def _program(text: str) -> str:
    if text.startswith("[") and not _is_list_of_words(text):
        return "must be a JSON list of strings, or a shell command"
    return ""


def _is_list_of_words(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, list) and all(isinstance(word, str) and fields.NUL not in word for word in found)


def _environment(text: str) -> str:
    name = re.split(r"[= ]", text, maxsplit=1)[0]
    if not _VARIABLE.fullmatch(name) or name == text:
        return "must be NAME=VALUE"
    return ""


def _ports(text: str) -> str:
    for word in text.split():
        match = _PORT.fullmatch(word)
        numbers = [int(number) for number in match.groups() if number] if match else [0]
        if not all(1 <= number <= fields.MAX_PORT for number in numbers) or numbers != sorted(numbers):
            return f"invalid port {word!r}; use 80, 53/udp or 8000-8010"
    return ""


def _labels(text: str) -> str:
    if "=" not in text:
        return "must be KEY=VALUE"
    if any(word.lstrip("\"'").startswith(RESERVED_LABEL_PREFIX) for word in text.split()):
        return f"keys that start with {RESERVED_LABEL_PREFIX} are reserved"
    return ""


def _user(text: str) -> str:
    return "" if len(text.split()) == 1 else "must be one word"


def _volumes(text: str) -> str:
    if text.startswith("["):
        if not _is_list_of_words(text):
            return "must be a JSON list of paths, or paths separated by spaces"
        paths = json.loads(text)
    else:
        paths = text.split()
    return "" if paths and all(path.startswith("/") for path in paths) else "must be absolute paths"


def _working_dir(text: str) -> str:
    return "" if text.startswith("/") else "must be an absolute path"


_RULES: Mapping[str, Callable[[str], str]] = {
    "CMD": _program,
    "ENTRYPOINT": _program,
    "ENV": _environment,
    "EXPOSE": _ports,
    "LABEL": _labels,
    "USER": _user,
    "VOLUME": _volumes,
    "WORKDIR": _working_dir,
}

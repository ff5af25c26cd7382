"""Requests of CommitContainer: image names, and instructions of a Dockerfile."""

from __future__ import annotations

from typing import Any

import pytest
from gpudock.v1 import container_service_pb2
from gpudock_server.core.containers.commands import Commit
from gpudock_server.rpc.containers.commit_request import commit

from tests.rpc.request_examples import UUID, violations_of


def request(**fields: Any) -> container_service_pb2.CommitContainerRequest:
    """Return a request that is valid except for `fields`."""
    return container_service_pb2.CommitContainerRequest(**{"name": "train", "repository": "team/model", **fields})


def test_a_request_becomes_a_command() -> None:
    full_request = request(
        tag="v1",
        author="me",
        comment="note",
        changes=["CMD true "],
        pause=False,
        replace=True,
        request_id=UUID,
        etag="e",
    )
    assert commit(full_request) == Commit(
        name="train",
        reference="team/model:v1",
        author="me",
        comment="note",
        changes=("CMD true",),
        pause=False,
        replace=True,
        etag="e",
    )
    assert commit(request()) == Commit(name="train", reference="team/model:latest", pause=True)


@pytest.mark.parametrize(
    "repository",
    [
        "a",
        "a/b/c",
        "a.b_c__d-e--f",
        "localhost/a",
        "localhost:5000/a",
        "Reg.example.com:80/a/b",
        "[::1]:5000/a",
        "0123",
    ],
)
def test_valid_repositories_are_accepted(repository: str) -> None:
    assert commit(request(repository=repository)).reference == f"{repository}:latest"


@pytest.mark.parametrize(
    "repository",
    [
        "", "Upper", "Upper/case", "a:tag", "reg:5000/a:tag", "a@sha256:" + "0" * 64, "f" * 64, "a//b", "/a", "a/",
        "-a", "a..b", "../a", "a b", "a\n", "reg.io/", "reg.io/A", "é", "a" * 256, "gpudock/layer", "gpudock/raw",
        "gpudock/commit",
    ],
)  # fmt: skip
def test_invalid_repositories_are_refused(repository: str) -> None:
    assert set(violations_of(commit, request(repository=repository))) == {"repository"}


@pytest.mark.parametrize("tag", ["-a", ".a", "a/b", "a:b", "a b", "a\n", "é", "x" * 129])
def test_invalid_tags_are_refused(tag: str) -> None:
    assert set(violations_of(commit, request(repository="Upper", tag=tag))) == {"repository", "tag"}


@pytest.mark.parametrize(
    "line",
    [
        "CMD true", 'cmd ["sh", "-c", "x"]', 'ENTRYPOINT ["a"]', "ENV A=1 B=2", "ENV A 1", "ENV PATH=$PATH:/opt",
        "EXPOSE 80 53/udp 8000-8010/tcp", "LABEL a=b", 'LABEL "a b"="c"', "LABEL url=https://gpudock.example",
        "USER 1:2", "VOLUME /a /b", 'VOLUME ["/a b"]', "WORKDIR /srv/app", "  WORKDIR /a  ",
    ],
)  # fmt: skip
def test_valid_instructions_are_accepted(line: str) -> None:
    assert commit(request(changes=[line])).changes == (line.strip(),)


@pytest.mark.parametrize(
    ("line", "violation"),
    [
        ("", "must start with one of"),
        ("RUN rm -rf /", "must start with one of"),
        ("ONBUILD CMD x", "must start with one of"),
        ("CMD", "needs an argument"),
        ("CMD [1]", "must be a JSON list of strings"),
        ('CMD ["a"', "must be a JSON list of strings"),
        ("CMD a\nRUN b", "one line"),
        ("CMD a \\", "one line"),
        ("ENV A", "NAME=VALUE"),
        ("ENV 1A=2", "NAME=VALUE"),
        ("EXPOSE 0", "invalid port"),
        ("EXPOSE 80/icmp", "invalid port"),
        ("EXPOSE 90-80", "invalid port"),
        ("EXPOSE 65536", "invalid port"),
        ("LABEL a", "KEY=VALUE"),
        ("LABEL gpudock.uid=x", "are reserved"),
        ('LABEL a=b "gpudock.name"=x', "are reserved"),
        ("USER a b", "one word"),
        ("VOLUME a", "absolute"),
        ('VOLUME ["a"]', "absolute"),
        ("VOLUME []", "absolute"),
        ("VOLUME [", "list of paths"),
        ("WORKDIR a", "absolute"),
        ("CMD " + "x" * 5000, "at most"),
    ],
)
def test_invalid_instructions_are_refused(line: str, violation: str) -> None:
    found = violations_of(commit, request(changes=["USER 1", line]))
    assert set(found) == {"changes[1]"}
    assert violation in found["changes[1]"]


def test_all_violations_are_reported_together() -> None:
    wrong = request(
        name="A", repository="B", tag="-", author="a" * 300, comment="c" * 2000, changes=["x"], request_id="no"
    )
    fields = {"name", "repository", "tag", "author", "comment", "changes[0]", "request_id"}
    assert set(violations_of(commit, wrong)) == fields
    assert set(violations_of(commit, request(changes=["CMD true"] * 65))) == {"changes"}

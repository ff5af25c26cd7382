"""The TCP listeners of the daemon: tokens, the audit log, and TLS with client certificates."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from gpudock.v1.container_service_pb2 import PauseContainerRequest

from tests.calls import Caller, failure
from tests.engine.grpcurl import GRPCURL
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig import Rig
from tests.rpc.certificates import Authority

__all__ = ["daemons"]


def grpcurl(rig: Rig, *words: str) -> str:
    """The output of grpcurl, run in the network namespace of the daemon's TCP addresses."""
    completed = rig.run(str(GRPCURL), *words, check=False)
    return completed.stdout + completed.stderr


PROTO = ("-import-path", "protos", "-proto", "gpudock/v1/node_service.proto")
GET_NODE = "gpudock.v1.NodeService/GetNode"


async def test_a_tcp_listener_on_loopback_needs_a_valid_token(
    daemons: IsolatedDaemons, rig: Rig, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice:0123456789abcdef0123456789abcdef\n")
    tokens.chmod(0o600)
    daemon = await daemons.start("--listen", "127.0.0.1:38051", "--token-file", str(tokens))

    assert "Unauthenticated" in await asyncio.to_thread(grpcurl, rig, "-plaintext", *PROTO, "127.0.0.1:38051", GET_NODE)
    wrong = ("-H", "authorization: Bearer 00000000000000000000000000000000")
    right = ("-H", "authorization: Bearer 0123456789abcdef0123456789abcdef")
    address = "127.0.0.1:38051"
    assert "Unauthenticated" in await asyncio.to_thread(grpcurl, rig, "-plaintext", *PROTO, *wrong, address, GET_NODE)
    assert daemons.node in await asyncio.to_thread(grpcurl, rig, "-plaintext", *right, address, GET_NODE)
    assert "SERVING" in await asyncio.to_thread(
        grpcurl, rig, "-plaintext", *right, address, "grpc.health.v1.Health/Check"
    )
    assert daemon.running


async def test_the_audit_log_names_the_caller(daemons: IsolatedDaemons, rig: Rig, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    secrets = {"alice": "0123456789abcdef0123456789abcdef", "bob": "fedcba9876543210fedcba9876543210"}
    tokens.write_text("".join(f"{name}:{token}\n" for name, token in secrets.items()))
    tokens.chmod(0o600)
    flags = ("--listen", "127.0.0.1:38053", "--token-file", str(tokens))
    daemon = await daemons.start(*flags, "--log-format", "json")
    proto = ("-import-path", "protos", "-proto", "gpudock/v1/container_service.proto")
    for token in (*secrets.values(), "unknown-token"):
        for name in ("none", "x" * 100_000):
            words = ("-H", f"authorization: Bearer {token}", "-d", json.dumps({"name": name}), "127.0.0.1:38053")
            await asyncio.to_thread(
                grpcurl, rig, "-plaintext", *proto, *words, "gpudock.v1.ContainerService/PauseContainer"
            )
    async with Caller(daemon.target) as caller:
        await failure(caller.containers.PauseContainer(PauseContainerRequest(name="none")))
    logged = [json.loads(line) for line in daemon.log_text.splitlines() if line.startswith("{")]
    audit = [line for line in logged if line["logger"] == "gpudock.audit"]
    assert [(line["caller_kind"], line["caller"], line["outcome"]) for line in audit] == [
        ("token", "alice", "NOT_FOUND"),
        ("token", "alice", "INVALID_ARGUMENT"),
        ("token", "bob", "NOT_FOUND"),
        ("token", "bob", "INVALID_ARGUMENT"),
        ("nobody", "", "UNAUTHENTICATED"),
        ("nobody", "", "UNAUTHENTICATED"),
        ("unix", "", "NOT_FOUND"),
    ]
    assert {line["method"] for line in audit} == {"PauseContainer"}
    assert max(map(len, daemon.log_text.splitlines())) < 2000
    assert not [token for token in secrets.values() if token in daemon.log_text]


async def test_a_tls_listener_accepts_only_certificates_of_its_client_authority(
    daemons: IsolatedDaemons, rig: Rig, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server, client = authority.sign("gpu1", "IP:127.0.0.1"), authority.sign("bob")
    stranger = Authority(tmp_path, "stranger").sign("mallory")
    address = "127.0.0.1:38052"
    await daemons.start(
        *("--listen", address, "--tls-cert", str(server.certificate), "--tls-key", str(server.key)),
        *("--tls-client-ca", str(authority.own.certificate)),
    )

    async def call(*words: str) -> str:
        return await asyncio.to_thread(
            grpcurl, rig, "-max-time", "5", "-connect-timeout", "2", *PROTO, *words, address, GET_NODE
        )

    ca = ("-cacert", str(authority.own.certificate))
    assert daemons.node in await call(*ca, "-cert", str(client.certificate), "-key", str(client.key))
    foreign = (*ca, "-cert", str(stranger.certificate), "-key", str(stranger.key))
    for options in ((), ca, ("-plaintext",), foreign):
        assert daemons.node not in await call(*options)

"""`gpudock create`."""

from __future__ import annotations

from typing import TypedDict, Unpack

import click

from gpudock import Client, Container, ContainerSpec, HealthCheck, Mount, OperationCall, PortRequest, RestartPolicy
from gpudock._enums import words_of
from gpudock.cli import _operation_views, _views
from gpudock.cli._arguments import Bind, Pair, Port, Restart, Size, Tmpfs
from gpudock.cli._follow import follow
from gpudock.cli._gpu_options import gpu_options, gpu_request_of
from gpudock.cli._session import Session
from gpudock.v1.container_service_pb2 import PullPolicy


class _Flags(TypedDict):
    """The options as click hands them over."""

    name: str
    image: str
    command: tuple[str, ...]
    entrypoint: str | None
    gpus: int | None
    gpu: tuple[str, ...]
    gpu_model: str
    gpu_memory: int
    publish: tuple[PortRequest, ...]
    env: tuple[tuple[str, str], ...]
    volume: tuple[Mount, ...]
    tmpfs: tuple[Mount, ...]
    label: tuple[tuple[str, str], ...]
    owner: str
    cpus: float
    memory: int
    shm_size: int
    restart: RestartPolicy | None
    health_cmd: str | None
    hostname: str | None
    user: str
    workdir: str
    tty: bool
    stdin: bool
    pull: str
    create_only: bool
    validate_only: bool


@click.command()
@click.argument("name")
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@gpu_options
@click.option("-p", "--publish", type=Port(), multiple=True, help="Publish a port, TCP unless it ends in /udp.")
@click.option("-e", "--env", type=Pair(), multiple=True, help="Set an environment variable.")
@click.option("-v", "--volume", type=Bind(), multiple=True, help="Mount a volume, or a path of the node.")
@click.option("--tmpfs", type=Tmpfs(), multiple=True, help="Mount a file system in memory.")
@click.option("--label", type=Pair(), multiple=True, help="Set a label.")
@click.option("--owner", default="", help="Who it belongs to, for lists to filter by.")
@click.option("--cpus", type=float, default=0.0, help="How many CPUs' worth of time it may use.")
@click.option("--memory", type=Size(), default=0, help="How much memory it may use, such as 8G.")
@click.option("--shm-size", type=Size(), default=0, help="The size of /dev/shm.")
@click.option("--restart", type=Restart(), help="When the engine starts the process again.")
@click.option("--health-cmd", help="Command of the health check, run by /bin/sh.")
@click.option("--hostname", help="The host name inside.")
@click.option("--user", default="", help="The user of the process, name or uid, with :group if need be.")
@click.option("--workdir", default="", help="The working directory of the process.")
@click.option("--entrypoint", help="Replaces the image's entrypoint; empty clears it.")
@click.option("--tty", is_flag=True, help="Give the process a terminal.")
@click.option("--stdin", is_flag=True, help="Keep the process's standard input open.")
@click.option(
    "--pull",
    type=click.Choice(words_of(PullPolicy)),
    default="missing",
    show_default=True,
    help="Whether the image is pulled first.",
)
@click.option("--create-only", is_flag=True, help="Do not start it.")
@click.option("--validate-only", is_flag=True, help="Show what would be done, and do nothing.")
@click.pass_obj
def create(session: Session, **flags: Unpack[_Flags]) -> None:
    """Create a container NAME from IMAGE and start it.

    COMMAND stands after `--`: gpudock create train pytorch/pytorch --gpus 2 -- python train.py --epochs 3
    """
    spec = _spec(flags)
    if flags["validate_only"]:
        plan = session.run(lambda client: _begin(client, flags, spec).plan())
        session.show(plan, _operation_views.plan)
        return
    made = session.run(lambda client: follow(_begin(client, flags, spec), flags["name"]))
    session.show(made, _views.one_container)


def _begin(client: Client, flags: _Flags, spec: ContainerSpec) -> OperationCall[Container]:
    return client.containers.create(
        flags["name"],
        spec,
        owner=flags["owner"],
        pull=flags["pull"],
        create_only=flags["create_only"],
        validate_only=flags["validate_only"],
    )


def _spec(flags: _Flags) -> ContainerSpec:
    health = flags["health_cmd"]
    return ContainerSpec(
        image=flags["image"],
        entrypoint=None if flags["entrypoint"] is None else [flags["entrypoint"]],
        command=flags["command"],
        env=dict(flags["env"]),
        working_dir=flags["workdir"],
        user=flags["user"],
        hostname=flags["hostname"],
        tty=flags["tty"],
        stdin=flags["stdin"],
        labels=dict(flags["label"]),
        gpus=gpu_request_of(flags["gpus"], flags["gpu"], flags["gpu_model"], flags["gpu_memory"]),
        cpus=flags["cpus"],
        memory_bytes=flags["memory"],
        shm_size_bytes=flags["shm_size"],
        mounts=[*flags["volume"], *flags["tmpfs"]],
        ports=flags["publish"],
        restart_policy=flags["restart"],
        health_check=None if health is None else HealthCheck(command=["/bin/sh", "-c", health]),
    )

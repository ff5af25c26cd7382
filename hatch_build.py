"""Build hook: generates the Python stubs in client/gpudock/v1/ from protos/, for wheels and editable installs."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def generate(root: Path) -> None:
    """Write `gpudock/v1/*_pb2.py`, `*_pb2_grpc.py` and their stubs below `root/client`; raises on any protoc error."""
    protos = root / "protos"
    target = root / "client" / "gpudock" / "v1"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    # protoc finds its plugins on PATH; in a build without isolation they are in the folder of the interpreter.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"-I{protos}",
        f"-I{well_known}",
        f"--python_out={root / 'client'}",
        f"--grpc_python_out={root / 'client'}",
        f"--mypy_out=quiet:{root / 'client'}",
        f"--mypy_grpc_out=quiet,only_async:{root / 'client'}",
        *(str(path.relative_to(protos)) for path in sorted(protos.glob("gpudock/v1/*.proto"))),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; see its message above")
    (target / "__init__.py").write_text('"""Generated from protos/gpudock/v1; see protos/."""\n')
    (target / "py.typed").touch()


class StubsBuildHook(BuildHookInterface[Any]):
    """Runs `generate` before hatchling collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (hatchling's signature)
        """Generate the stubs; hatchling calls this for every wheel, including editable ones."""
        generate(Path(self.root))

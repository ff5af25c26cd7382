"""The main job, step by step, as a user would do it with the `gpudock` command."""

from __future__ import annotations

from .screen import Screen
from .shell import CommandOutput, Shell, expect

IMAGE = "demo/trainer:1"

_SERVE = b"""#!/bin/sh
# The container's main process: serves /www until it is asked to end.
trap 'exit 0' TERM INT
httpd -f -p 8888 -h /www &
wait $!
"""
_TRAIN = b"""#!/bin/sh
# Simulates a training run: prints a line at the end of each epoch.
gpus=$(find /dev -name 'nvidia[0-9]*' | wc -l)
epoch=0
for loss in 2.31 1.12 0.67 0.48 0.39; do
    sleep 0.4
    epoch=$((epoch + 1))
    echo "epoch $epoch/5 on $gpus GPUs: loss $loss"
done
"""
IMAGE_FILES = {
    "/usr/local/bin/serve": _SERVE,
    "/usr/local/bin/train": _TRAIN,
    "/www/index.html": b"<p>as the image has it</p>\n",
    "/www/old.html": b"<p>a file of the image</p>\n",
}

_GPUS = 8
_EPOCHS = 5
# The first and the last line are four epochs of 0.4 s apart, unless the output comes only at the end.
_STREAMED_S = 0.8
_PAGE = "<p>written in the container</p>"

_WRITE_FILES = f"""\
gpudock exec train -- sh -c 'echo "{_PAGE}" > /www/index.html
  rm /www/old.html
  head -c 8388608 /dev/urandom > /root/model.bin
  ln /root/model.bin /root/best.bin'"""
_SHOW_FILES = """\
gpudock exec train -- sh -c 'ls /dev | grep "nvidia[0-9]"
  ls -l /www /root; md5sum /root/*.bin'"""


class Walkthrough:
    """Runs each step once. Raises UnexpectedResult if a result is not the expected one."""

    def __init__(self, screen: Screen, shell: Shell) -> None:
        self._screen = screen
        self._shell = shell
        self._port = ""
        self._files: list[str] = []
        self._held: set[str] = set()

    def run(self) -> None:
        """Run all steps, from create to delete."""
        self._create()
        self._exec()
        self._write()
        self._scale(4)
        self._scale(0)
        self._scale(1)
        self._stop()
        self._start()
        self._delete()

    def _create(self) -> None:
        self._screen.step("Create a container with two GPUs and a published port")
        made = self._shell.run(f"gpudock create train {IMAGE} --gpus 2 -p 8888")
        self._port = self._require_running(made, gpus=2)
        self._require_free(_GPUS - 2)

    def _exec(self) -> None:
        self._screen.step("Run a command; its output is printed as it comes")
        output = self._shell.run("gpudock exec train -- train")
        expected = [f"epoch {number}/{_EPOCHS} on 2 GPUs" for number in range(1, _EPOCHS + 1)]
        expect([line.partition(":")[0] for line in output.lines] == expected, f"the lines {expected}")
        took = output.times[-1] - output.times[0]
        expect(took > _STREAMED_S, f"the lines to be printed over more than {_STREAMED_S} s, not {took:.2f} s")
        self._screen.verified(f"{_EPOCHS} lines were printed over {took:.1f} s")

    def _write(self) -> None:
        self._screen.step("Change a file, delete a file of the image, write 8 MiB with a hard link")
        self._shell.run(_WRITE_FILES)
        self._files = files = self._require_devices(gpus=2)
        expect("old.html" not in "".join(files), "the file of the image to be deleted")
        links = {line.split()[-1]: line.split()[1] for line in files if line.startswith("-")}
        expect(links.get("model.bin") == links.get("best.bin") == "2", "two hard links to one file")
        self._require_page()

    def _scale(self, gpus: int) -> None:
        before = self._held
        self._screen.step(f"Scale: {len(before)} → {_gpus(gpus)}")
        scaled = self._shell.run(f"gpudock scale train --gpus {gpus}")
        port = self._require_running(scaled, gpus=gpus)
        expect(port == self._port, f"the same port {self._port}, not {port}")
        files = self._require_devices(gpus)
        expect(before <= self._held or self._held <= before, "the container to keep its GPUs")
        expect(files == self._files, "the same files, links, times and content as before")
        self._require_page()
        self._screen.verified(f"{_gpus(gpus)}, the same port, and all files unchanged")

    def _stop(self) -> None:
        self._screen.step("Stop: GPUs and ports are released, files are kept")
        row = _only_row(self._shell.run("gpudock stop train"))
        expect(
            (row["STATE"], row["GPUS"], row["PORTS"]) == ("STOPPED", "0", ""),
            "a stopped container without GPUs and ports",
        )
        self._require_free(_GPUS)

    def _start(self) -> None:
        self._screen.step("Start: the container gets as many GPUs as before")
        self._port = self._require_running(self._shell.run("gpudock start train"), gpus=1)
        expect(self._require_devices(gpus=1) == self._files, "the same files, links, times and content as before")
        self._require_page()
        self._screen.verified(f"{_gpus(1)}, and all files unchanged")

    def _delete(self) -> None:
        self._screen.step("Delete")
        self._shell.run("gpudock delete train --force")
        expect(not self._shell.run("gpudock list").rows, "an empty list of containers")
        self._require_free(_GPUS)

    def _require_running(self, output: CommandOutput, gpus: int) -> str:
        """Verify the container's row; returns the host port."""
        row = _only_row(output)
        expect(row["NAME"] == "train", "the row of train")
        expect(row["STATE"] == "RUNNING", f"train to be RUNNING, not {row['STATE']}")
        expect(row["GPUS"] == str(gpus), f"{gpus} GPUs, not {row['GPUS']}")
        host, _, inside = row["PORTS"].partition("->")
        expect(host.isdecimal() and inside == "8888/tcp", f"port 8888 to be published, not {row['PORTS']!r}")
        return host

    def _require_free(self, expected: int) -> None:
        rows = self._shell.run("gpudock gpus").rows
        free = sum(row["CONTAINER"] == "-" for row in rows)
        expect(len(rows) == _GPUS, f"{_GPUS} GPUs, not {len(rows)}")
        expect(free == expected, f"{expected} free GPUs, not {free}")
        self._screen.verified(f"{free} of {_GPUS} GPUs are free")

    def _require_devices(self, gpus: int) -> list[str]:
        """Verify that the container has exactly the devices of its GPUs. Returns the lines about its files."""
        held = {row["INDEX"] for row in self._shell.run("gpudock gpus --container train").rows}
        expect(len(held) == gpus, f"train to hold {_gpus(gpus)}, not {len(held)}")
        lines = self._shell.run(_SHOW_FILES).lines
        devices = {line for line in lines if line.startswith("nvidia")}
        expected = {f"nvidia{index}" for index in held}
        expect(devices == expected, f"the devices {sorted(expected)} in the container, not {sorted(devices)}")
        self._held = held
        return [line for line in lines if line not in devices]

    def _require_page(self) -> None:
        page = self._shell.fetch(self._port).strip()
        expect(page == _PAGE, f"the page {_PAGE!r}, not {page!r}")


def _only_row(output: CommandOutput) -> dict[str, str]:
    rows = output.rows
    expect(len(rows) == 1, f"a table of one line, not {len(rows)}")
    return rows[0]


def _gpus(number: int) -> str:
    return f"{number} GPU" if number == 1 else f"{number} GPUs"

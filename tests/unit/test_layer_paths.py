"""A path that is not a writable layer is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from gpudock_server.adapters.layers.overlay2 import LayerRefusedError, find_layer

from tests.engine.sample_trees import create_layer_folders


def test_a_layer_is_found(tmp_path: Path) -> None:
    (diff,) = create_layer_folders(tmp_path, 1)
    layer = find_layer(str(tmp_path), str(diff))
    assert (layer.path, layer.inode, layer.device) == (str(diff), diff.stat().st_ino, diff.stat().st_dev)
    assert layer.image_layers == ("l/IMAGE0000000000000000000000",)


def test_a_data_folder_behind_a_link_is_followed(tmp_path: Path) -> None:
    (diff,) = create_layer_folders(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    assert find_layer(str(tmp_path / "link"), str(diff)).inode == diff.stat().st_ino
    assert find_layer(str(tmp_path / "link"), str(diff).replace("/real/", "/link/")).inode == diff.stat().st_ino


ID = f"{1:064x}"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "//",
        ".",
        "..",
        "/etc",
        "{root}",
        "{root}/",
        "{root}/overlay2",
        "{root}/overlay2/",
        "{root}/overlay2/diff",
        "{root}/overlay2//diff",
        "{root}/overlay2/l",
        "{root}/overlay2/{id}",
        "{root}/overlay2/{id}/",
        "{root}/overlay2/{id}/diff/",
        "{root}/overlay2/{id}/diff/.",
        "{root}/overlay2/{id}/diff/..",
        "{root}/overlay2/{id}/diff/etc",
        "{root}/overlay2/{id}/work",
        "{root}/overlay2/{id}/merged",
        "{root}/overlay2/{id}-init/diff",
        "{root}/overlay2/../overlay2/{id}/diff",
        "{root}/overlay2/./{id}/diff",
        "/{root}/overlay2/{id}/diff",
        "{root}/other/{id}/diff",
        "{root}x/overlay2/{id}/diff",
        "overlay2/{id}/diff",
        "{root}/overlay2/{id}/diff\0",
        "{root}/overlay2/{id}/diff\n",
        "{root}/overlay2/{upper}/diff",
        "{root}/overlay2/{short}/diff",
        "{root}/overlay2/{unknown}/diff",
    ],
)
def test_a_path_that_is_not_a_layer_is_refused(tmp_path: Path, path: str) -> None:
    create_layer_folders(tmp_path, 1, 0xABC)
    names = {"root": tmp_path, "id": ID, "upper": f"{0xABC:064X}", "short": ID[1:], "unknown": f"{9:064x}"}
    with pytest.raises(LayerRefusedError):
        find_layer(str(tmp_path), path.format(**names))


@pytest.mark.parametrize("root", ["", "/", "//", "relative", "/tmp/..", "/nowhere-at-all"])
def test_an_invalid_data_folder_is_refused(tmp_path: Path, root: str) -> None:
    (diff,) = create_layer_folders(tmp_path, 1)
    with pytest.raises(LayerRefusedError):
        find_layer(root, str(diff))


def _other_folder(diff: Path) -> Path:
    folder = diff.parents[2] / "other"
    folder.mkdir()
    return folder


def _link_for_diff(diff: Path) -> None:
    diff.rmdir()
    diff.symlink_to(_other_folder(diff))


def _link_for_folder(diff: Path) -> None:
    target = _other_folder(diff) / "folder"
    diff.parent.rename(target)
    diff.parent.symlink_to(target)


def _link_for_overlay2(diff: Path) -> None:
    target = _other_folder(diff) / "overlay2"
    diff.parents[1].rename(target)
    diff.parents[1].symlink_to(target)


def _file_for_diff(diff: Path) -> None:
    diff.rmdir()
    diff.touch()


def _no_diff(diff: Path) -> None:
    diff.rmdir()


def _no_link_file(diff: Path) -> None:
    (diff.parent / "link").unlink()


def _odd_link_file(diff: Path) -> None:
    (diff.parent / "link").write_text("../../../etc")


def _link_of_another(diff: Path) -> None:
    (diff.parent / "link").write_text((diff.parents[1] / f"{2:064x}/link").read_text())


def _link_to_another(diff: Path) -> None:
    link = diff.parents[1] / "l" / (diff.parent / "link").read_text()
    link.unlink()
    link.symlink_to(f"../{2:064x}/diff")


def _pipe_for_link_file(diff: Path) -> None:
    (diff.parent / "link").unlink()
    os.mkfifo(diff.parent / "link")


def _no_lower_file(diff: Path) -> None:
    (diff.parent / "lower").unlink()


def _image_layer(diff: Path) -> None:
    (diff.parent / "lower").write_text("l/IMAGE0000000000000000000000")


def _no_init_layer(diff: Path) -> None:
    init = diff.parents[1] / f"{diff.parent.name}-init"
    (init / "link").unlink()


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "change",
    [
        _link_for_diff,
        _link_for_folder,
        _link_for_overlay2,
        _file_for_diff,
        _no_diff,
        _no_link_file,
        _odd_link_file,
        _link_of_another,
        _link_to_another,
        _pipe_for_link_file,
        _no_lower_file,
        _image_layer,
        _no_init_layer,
    ],
)
def test_a_layer_with_inconsistent_metadata_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    diff, _ = create_layer_folders(tmp_path, 1, 2)
    change(diff)
    with pytest.raises(LayerRefusedError):
        find_layer(str(tmp_path), str(diff))

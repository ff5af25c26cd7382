"""A tree and its mirror are equal after the last pass, after any changes of the tree between passes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from gpudock_server.adapters.host.filesystem import open_directory
from gpudock_server.adapters.host.trees.comparison import differences
from gpudock_server.adapters.host.trees.entry_copy import EntryCopier
from gpudock_server.adapters.host.trees.folders import empty_folder
from gpudock_server.adapters.host.trees.interrupt import Interrupt, Interrupted
from gpudock_server.adapters.host.trees.mirror import CopyIndex, Mirror
from gpudock_server.adapters.host.trees.snapshot_index import Index, load_index, save_index
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.engine.sample_trees import TreeEntry, read_tree, tree_differences
from tests.engine.tree_edits import EDITS, EditedTree
from tests.rig.patience import limit

# The longest tick of the kernel clock; files that are older than that are trusted to be unchanged.
TICK_NS = 10_000_000
# Hard links to one inode are spread over the trees of several snapshots, so nlink is not compared.
IGNORED_FIELDS = frozenset({"nlink"})

edits = st.lists(
    st.tuples(st.integers(0, len(EDITS) - 1), st.integers(0, 1 << 16), st.integers(0, 1 << 16)), max_size=25
)


class Generation:
    """A mirror of a tree, which shares files with the mirror `before`."""

    def __init__(self, source: Path, folder: Path, before: Generation | None) -> None:
        self.source, self.folder, self.before = source, folder, before
        self.tree = folder / "tree"
        self.tree.mkdir(parents=True)
        self.index = Index(source.stat().st_dev)
        self.moved = 0

    def run(self, *, live: bool, quiet: bool = False, clones: bool = False, interrupt: Interrupt | None = None) -> None:
        """Run one pass."""
        interrupt = interrupt or Interrupt()
        with ExitStack() as stack:
            source, target, state = (
                stack.enter_context(open_directory(each)) for each in (self.source, self.tree, self.folder)
            )
            previous = None
            if self.before:
                tree = stack.enter_context(open_directory(self.before.tree))
                previous = CopyIndex(self.before.index, tree, self.index.device)
                stack.callback(previous.open_folders.close)
            entry_copier = EntryCopier(interrupt, lambda _count: None, clones=clones)
            mirror = Mirror(
                source, target, state, entry_copier, interrupt, previous=previous, live=live, quiet=quiet,
                handled=lambda _count: None, tick_ns=TICK_NS,
            )  # fmt: skip
            self.index = mirror.run(self.index)
            self.moved = mirror.moved.entries
            save_index(self.index, state)
            assert load_index(state, same_boot=True) == self.index

    def check(self) -> None:
        """Fail unless the mirror equals its source."""
        assert (
            tree_differences(read_tree(str(self.source)), read_tree(str(self.tree)), ignored_fields=IGNORED_FIELDS)
            == ""
        )
        assert differences(str(self.source), str(self.tree), Interrupt()) == []


def let_the_clock_tick(folder: Path) -> None:
    """Wait until changes have a later ctime than all previous changes, which are then a tick old."""
    probe = folder / "probe"
    probe.touch()
    start_ns = probe.stat().st_ctime_ns
    deadline = time.monotonic() + limit(10)
    while probe.stat().st_ctime_ns <= start_ns + 2 * TICK_NS:
        assert time.monotonic() < deadline
        probe.touch()


@contextmanager
def disk_folder() -> Iterator[Path]:
    """A folder on a disk; tmp_path can be in memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


# A whiteout and a folder swap their names; whiteouts that are hard links of one inode.
@example(batches=[[], [], [], [(0, 0, 0), (0, 0, 1), (16, 2, 0), (17, 0, 0)], [(10, 0, 2)]])
@example(batches=[[], [(16, 1, 0)], [(8, 0, 0), (12, 0, 0)], []])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(batches=st.lists(edits, min_size=4, max_size=8))
def test_random_edits_between_passes_and_snapshots(batches: list[list[tuple[int, int, int]]]) -> None:
    with disk_folder() as folder:
        source = folder / "source"
        source.mkdir()
        edited = EditedTree(str(source))
        before: Generation | None = None
        sealed: list[tuple[Generation, dict[bytes, TreeEntry]]] = []
        try:
            for number, batch in enumerate(batches):
                for edit in batch:
                    edited.edit(*edit)
                if number % 3 == 0:
                    before = Generation(source, folder / str(number), before)
                if number % 4:
                    let_the_clock_tick(folder)
                assert before is not None
                before.run(live=True)
                if number % 3 == 2:
                    before.run(live=False)
                    before.check()
                    sealed.append((before, read_tree(str(before.tree))))
            for generation, tree in sealed:
                assert tree_differences(tree, read_tree(str(generation.tree)), ignored_fields=IGNORED_FIELDS) == "", (
                    "a sealed mirror changed"
                )
        finally:
            edited.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with disk_folder() as path:
        (path / "source").mkdir()
        yield path


def _source_with_files(folder: Path) -> Path:
    source = folder / "source"
    for name in ("one", "two"):
        (source / name).mkdir()
        for number in range(20):
            (source / name / f"f{number}").write_text(f"{name} {number}")
    (source / "one/linked").hardlink_to(source / "two/f0")
    return source


def test_unchanged_files_are_not_copied_again(folder: Path) -> None:
    source = _source_with_files(folder)
    let_the_clock_tick(folder)
    mirror = Generation(source, folder / "first", None)
    mirror.run(live=True)
    assert mirror.moved == 44
    mirror.run(live=False)
    assert mirror.moved == 0
    (source / "one/f3").write_text("changed")
    mirror.run(live=False)
    assert mirror.moved == 1
    mirror.check()


def test_the_first_file_is_copied_once_if_extents_cannot_be_shared(folder: Path) -> None:
    """Only a copy of a file shows whether extents can be shared; that file must not be copied in every pass."""
    (folder / "source/file").write_text("content")
    let_the_clock_tick(folder)
    mirrored = Generation(folder / "source", folder / "1", None)
    mirrored.run(live=True, clones=True)
    assert mirrored.moved == 2
    mirrored.run(live=True, clones=True)
    assert mirrored.moved == 0
    mirrored.check()


def test_the_next_snapshot_links_unchanged_files_also_after_a_copy_of_the_tree(folder: Path) -> None:
    source = _source_with_files(folder)
    let_the_clock_tick(folder)
    first = Generation(source, folder / "first", None)
    first.run(live=False, quiet=True)
    shutil.copytree(source, folder / "elsewhere", symlinks=True)  # other inodes, as after a transfer by copy
    (source / "one").rename(source / "renamed")
    (source / "two/f1").write_text("other")
    second = Generation(source, folder / "second", first)
    second.run(live=False, quiet=True)
    second.check()
    assert _inode(second, "renamed/f5") == _inode(first, "one/f5")
    assert _inode(second, "two/f2") == _inode(first, "two/f2")
    assert _inode(second, "two/f1") != _inode(first, "two/f1")
    assert _inode(second, "two/f0") == _inode(second, "renamed/linked")
    third = Generation(folder / "elsewhere", folder / "third", first)
    third.run(live=False, quiet=True)
    third.check()
    assert _inode(third, "two/f2") == _inode(first, "two/f2")


def _inode(generation: Generation, path: str) -> int:
    return (generation.tree / path).stat().st_ino


def test_a_changed_file_with_its_old_mtime_is_copied(folder: Path) -> None:
    source = _source_with_files(folder)
    let_the_clock_tick(folder)
    first = Generation(source, folder / "first", None)
    first.run(live=False, quiet=True)
    path = source / "one/f7"
    times = path.stat()
    path.write_text("ONE 7")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = Generation(source, folder / "second", first)
    second.run(live=False, quiet=True)
    second.check()
    assert (first.tree / "one/f7").read_text() == "one 7"


def test_a_tree_deeper_than_the_longest_path_is_mirrored(folder: Path) -> None:
    deep = os.open(folder / "source", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("folder", dir_fd=deep)
        below = os.open("folder", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=deep))
    os.close(deep)
    mirror = Generation(folder / "source", folder / "first", None)
    mirror.run(live=False)
    assert mirror.moved == 1502
    mirror.run(live=False, quiet=True)
    assert len(mirror.index) == 1502
    for each in (folder / "source", mirror.tree):
        with open_directory(each) as root:
            empty_folder(root, Interrupt())
        assert list(each.iterdir()) == []


def test_symbolic_links_are_not_followed(folder: Path) -> None:
    source = _source_with_files(folder)
    (folder / "outside").mkdir()
    (folder / "outside/secret").write_text("secret")
    (source / "link-out").symlink_to(folder / "outside")
    mirror = Generation(source, folder / "first", None)
    mirror.run(live=False)
    mirror.check()
    assert (mirror.tree / "link-out").is_symlink()


def test_an_interrupted_pass_ends_early(folder: Path) -> None:
    mirror = Generation(_source_with_files(folder), folder / "first", None)
    interrupt = Interrupt()
    interrupt.set()
    with pytest.raises(Interrupted):
        mirror.run(live=True, interrupt=interrupt)


def test_a_damaged_index_is_not_loaded(folder: Path) -> None:
    mirror = Generation(_source_with_files(folder), folder / "first", None)
    mirror.run(live=False)
    whole = (mirror.folder / "index").read_bytes()
    with open_directory(mirror.folder) as state:
        for damaged in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1]), b"{}\n"):
            (mirror.folder / "index").write_bytes(damaged)
            assert load_index(state, same_boot=True) is None

"""Before the first step: no room, or no way to write, is said then and not at the first save."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moetrain.checkpoint import disk
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import DiskError
from moetrain.train.checkpoint.disk_space import check_disk, estimate
from tests.support.checkpoints import SIZES, saved
from tests.support.training import make_run


@pytest.fixture(scope="module")
def run():
    return make_run(SIZES)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The file system says it has `size` bytes left."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))


def test_the_estimate_is_what_a_checkpoint_takes(run, tmp_path):
    directory = saved(run, tmp_path)
    actual = sum(path.stat().st_size for path in directory.iterdir())
    assert actual <= estimate(run.state, run.mesh) <= 1.1 * actual + 2000


@pytest.mark.parametrize("interval, minutes, steps, keep, copies", [
    (0, 0, 100, 2, 1), (10, 0, 100, 2, 3), (10, None, 100, 5, 6), (50, 0, 100, 2, 2), (10, 15, 100, None, 10),
    (0, 15, 100, 2, 3), (50, 15, 100, 2, 3), (0, 15, 1, 2, 1), (0, 15, 100, None, 1)])
def test_room_for_the_checkpoints_of_the_run_and_no_more(run, tmp_path, monkeypatch, interval, minutes, steps,
                                                         keep, copies):
    config = CheckpointConfig(interval=interval, every_minutes=minutes, keep=keep)
    size = estimate(run.state, run.mesh)
    free(monkeypatch, copies * size)
    assert check_disk(run.state, tmp_path, run.mesh, config, steps) == size
    free(monkeypatch, copies * size - 1)
    with pytest.raises(DiskError) as caught:
        check_disk(run.state, tmp_path, run.mesh, config, steps)
    assert (caught.value.id, caught.value.code) == ("E-DISK-006", 14) and f"{copies} of" in caught.value.why


def test_older_checkpoints_of_the_run_count_as_room(run, tmp_path, monkeypatch):
    size = estimate(run.state, run.mesh)
    there = sum(path.stat().st_size for path in saved(run, tmp_path, 1).iterdir())
    free(monkeypatch, 3 * size - there)
    check_disk(run.state, tmp_path, run.mesh, CheckpointConfig(interval=1), 10)


def test_a_directory_that_cannot_be_made_is_refused(run, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(DiskError, match="E-DISK-004"):
        check_disk(run.state, tmp_path, run.mesh, CheckpointConfig(), 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(run, tmp_path):
    """T14."""
    (tmp_path / "checkpoints").mkdir(mode=0o500)
    with pytest.raises(DiskError, match="Permission denied"):
        check_disk(run.state, tmp_path, run.mesh, CheckpointConfig(), 1)


def test_a_disk_that_gives_back_something_else_is_refused(run, tmp_path):
    def spoil(when: str, what: str, path: Path, length: int) -> None:
        if (when, what) == ("after", "fsync"):
            path.write_bytes(bytes(8))

    with disk.observed(spoil), pytest.raises(DiskError, match="reads differently"):
        check_disk(run.state, tmp_path, run.mesh, CheckpointConfig(), 1)


def test_a_disk_that_refuses_to_write_is_refused_and_the_probe_is_gone_next_time(run, tmp_path):
    def refuse(when: str, what: str, path: Path, length: int) -> None:
        if what == "fsync":
            raise OSError(errno.EROFS, "Read-only file system")

    with disk.observed(refuse), pytest.raises(DiskError, match="Read-only file system"):
        check_disk(run.state, tmp_path, run.mesh, CheckpointConfig(), 1)
    check_disk(run.state, tmp_path, run.mesh, CheckpointConfig(), 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []

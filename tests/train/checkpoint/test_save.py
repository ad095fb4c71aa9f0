"""Asynchronous saves write the step that was saved; a failure costs one save, never the run."""

import errno
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import disk
from moetrain.checkpoint.manifest import checkpoints_of
from moetrain.checkpoint.verify import problems
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import DiskError
from moetrain.train.checkpoint import save as writer
from moetrain.train.checkpoint.load import load, resume
from moetrain.train.checkpoint.save import SaveFlags, Saver, save
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.checkpoints import SIZES, tensors, trained
from tests.support.training import make_run


@contextmanager
def held(what: str = "fsync") -> Iterator[threading.Event]:
    """Saves stop before their first `what` until the event is set, or the block ends."""
    go = threading.Event()

    def wait(when: str, change: str, path: Path, count: int) -> None:
        if (when, change) == ("before", what):
            assert go.wait(60)

    with disk.observed(wait):
        yield go
        go.set()


@contextmanager
def full_after(size: int) -> Iterator[list[int]]:
    """The disk takes `size` bytes, then it is full. Gives the bytes that were written."""
    written = [0]

    def count(when: str, change: str, path: Path, length: int) -> None:
        if (when, change) == ("before", "write"):
            written[0] += length
            if written[0] > size:
                raise OSError(errno.ENOSPC, "No space left on device")

    with disk.observed(count):
        yield written


def saver(run: Run, run_dir: Path, **keys: object) -> Saver:
    return Saver(run_dir, run.mesh, CheckpointConfig(**keys))


def steps_there(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints_of(run_dir)]


def assert_clean(run_dir: Path, *steps: int) -> None:
    """Exactly these checkpoints, each good, and nothing else."""
    assert (sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            == [f"step-{step:08d}" for step in steps])
    assert [error for path in checkpoints_of(run_dir) for error in problems(path)] == []


def test_training_goes_on_while_the_writer_is_held_and_the_file_has_the_old_values(tmp_path):
    run, other = trained(2), make_run(SIZES)
    saves, before = saver(run, tmp_path), tensors(run.state)
    with held("create"):
        saves.begin(run.state, {})
        for step in (3, 4):
            train_step(run, step)
            assert saves.settle(saves.poll()) is None and saves.poll() == SaveFlags()
        assert checkpoints_of(tmp_path) == []
    assert saves.finish().path == tmp_path / "checkpoints/step-00000002"
    load(other.state, tmp_path / "checkpoints/step-00000002")
    assert other.state.step == 2 != run.state.step
    changed = 0
    for name, tensor in tensors(other.state).items():
        assert torch.equal(tensor, before[name]), name
        changed += not torch.equal(tensor, tensors(run.state)[name])
    # All live tensors have changed since, so an alias would be detected.
    assert changed == len(before)


def test_a_save_is_settled_in_two_looks_and_only_then_it_is_there(tmp_path):
    run = trained(1)
    saves = saver(run, tmp_path)
    assert (saves.poll(), saves.settle(SaveFlags())) == (SaveFlags(), None)
    with held("fsync") as go:
        saves.begin(run.state, {})
        assert saves.poll() == SaveFlags()
        go.set()
        saves.job.wait(30)
        assert saves.poll() == SaveFlags(done=1) and saves.settle(SaveFlags(done=1)) is None
        saves.job.wait(30)
        outcome = saves.settle(saves.poll())
    assert (outcome.step, outcome.path) == (1, tmp_path / "checkpoints/step-00000001")
    assert (saves.poll(), saves.settle(SaveFlags()), saves.finish()) == (SaveFlags(), None, None)
    assert_clean(tmp_path, 1)


def test_a_save_that_is_slower_than_the_interval_is_waited_for_and_reported(tmp_path, caplog, monkeypatch):
    """T31. At most one thread writes, whatever the interval."""
    monkeypatch.setattr(writer, "UNNOTICED_S", 0.1)
    run, writing = trained(1), []
    saves = saver(run, tmp_path)

    def look(when: str, change: str, path: Path, count: int) -> None:
        writing.append(sum(thread.name.startswith("save-") for thread in threading.enumerate()))

    with disk.observed(look), held("fsync") as go, caplog.at_level(logging.WARNING):
        saves.begin(run.state, {})
        train_step(run, 2)
        threading.Timer(0.2, go.set).start()
        first = saves.begin(run.state, {})
    assert first.step == 1 and first.path and first.held_s > 0.1
    assert "step 2 was to be saved while the save of step 1 was still under way" in caplog.text
    assert saves.finish().step == 2
    assert max(writing) == 1
    assert_clean(tmp_path, 1, 2)


def test_without_async_save_begin_waits(tmp_path):
    run = trained(1)
    assert saver(run, tmp_path, async_save=False).begin(run.state, {}).path.is_dir()
    assert_clean(tmp_path, 1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_full_disk_costs_one_save(tmp_path, caplog, share):
    """T13. The older checkpoint is intact, nothing of the failed one is left, the next save succeeds."""
    run = trained(1)
    saves = saver(run, tmp_path, async_save=False)
    with full_after(1 << 40) as written:
        saves.begin(run.state, {})
    train_step(run, 2)
    with full_after(int(written[0] * share)), caplog.at_level(logging.WARNING):
        outcome = saves.begin(run.state, {})
    assert (outcome.step, outcome.path) == (2, None)
    assert "the save of step 2 failed (1 of 3 in a row): No space left on device" in caplog.text
    assert_clean(tmp_path, 1)
    train_step(run, 3)
    assert saves.begin(run.state, {}).path and saves.failed_in_a_row == 0
    assert_clean(tmp_path, 1, 3)


def test_three_failed_saves_in_a_row_end_the_run_and_two_do_not(tmp_path):
    run = trained(1)
    saves = saver(run, tmp_path, async_save=False)
    for _ in range(2):
        with full_after(100):
            assert saves.begin(run.state, {}).path is None
            assert saves.begin(run.state, {}).path is None
        assert saves.begin(run.state, {}).path is not None           # counted in a row
        shutil.rmtree(tmp_path / "checkpoints")
    with full_after(100), pytest.raises(DiskError) as caught:
        for _ in range(3):
            saves.begin(run.state, {})
    assert (caught.value.id, caught.value.code) == ("E-DISK-005", 14) and "No space left" in caught.value.why
    assert saves.job is None and saves.attempt == 9


@pytest.mark.parametrize("async_save", [True, False])
def test_the_save_at_the_end_must_succeed(tmp_path, async_save):
    run = trained(1)
    saves = saver(run, tmp_path, async_save=async_save)
    with full_after(100), pytest.raises(DiskError) as caught:
        saves.begin(run.state, {})
        saves.finish(required=True)
    assert caught.value.id == "E-DISK-002" and "No space left" in caught.value.why


def test_a_checkpoint_directory_that_vanishes_costs_one_save(tmp_path, caplog):
    """T14. It is made again at the next save."""
    run = trained(1)
    saves = saver(run, tmp_path, async_save=False)

    def vanish(when: str, change: str, path: Path, count: int) -> None:
        if (when, change, path.name) == ("before", "create", "manifest.json"):
            shutil.rmtree(tmp_path / "checkpoints")

    with disk.observed(vanish), caplog.at_level(logging.WARNING):
        assert saves.begin(run.state, {}).path is None
    assert "No such file or directory" in caplog.text
    assert saves.begin(run.state, {}).path
    assert_clean(tmp_path, 1)


def test_a_mistake_in_the_thread_is_a_failed_save_with_its_traceback(tmp_path, caplog):
    """Trap 7: an error in a thread must not be lost, whatever it is."""
    run = trained(1)

    def wrong(when: str, change: str, path: Path, count: int) -> None:
        if change == "write":
            raise ZeroDivisionError("a mistake")

    saves = saver(run, tmp_path, async_save=False)
    with disk.observed(wrong), caplog.at_level(logging.WARNING):
        assert saves.begin(run.state, {}).path is None
    assert "ZeroDivisionError" in caplog.text and "failed (1 of 3 in a row): a mistake" in caplog.text


def test_a_failed_commit_leaves_the_older_ones_and_nothing_else(tmp_path):
    run = trained(1)
    saves = saver(run, tmp_path, async_save=False)
    saves.begin(run.state, {})
    train_step(run, 2)

    def fail(when: str, change: str, path: Path, count: int) -> None:
        if change == "rename":
            raise OSError(errno.EIO, "Input/output error")

    with disk.observed(fail):
        assert saves.begin(run.state, {}).path is None
    assert_clean(tmp_path, 1)


def test_a_failed_clean_up_of_old_checkpoints_is_no_failed_save(tmp_path, caplog):
    run = trained(1)
    saves = saver(run, tmp_path, async_save=False, keep=2)
    for step in (1, 2):
        run.state.step = step
        saves.begin(run.state, {})

    def fail(when: str, change: str, path: Path, count: int) -> None:
        if change == "rename" and path.name == "step-00000001":
            raise OSError(errno.EACCES, "Permission denied")

    run.state.step = 3
    with disk.observed(fail), caplog.at_level(logging.WARNING):
        assert saves.begin(run.state, {}).path.name == "step-00000003"
    assert steps_there(tmp_path) == [1, 2, 3] and "could not be removed" in caplog.text


def test_a_save_of_a_step_that_is_there_changes_nothing(tmp_path):
    run = trained(1)
    directory = save(run.state, tmp_path, run.mesh, {"mark": 1})
    before = {path: path.read_bytes() for path in directory.iterdir()}
    assert save(run.state, tmp_path, run.mesh, {"mark": 2}) == directory
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert_clean(tmp_path, 1)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    run = trained(1)
    directory = save(run.state, tmp_path, run.mesh, {})
    (directory / "manifest.json").write_text("rubbish")
    assert save(run.state, tmp_path, run.mesh, {}) == directory
    assert [error for error in problems(directory)] == []
    assert (tmp_path / "checkpoints/step-00000001.damaged").is_dir()
    other = make_run([*SIZES, "run.seed=9"])
    assert resume(other.state, tmp_path, other.mesh).path == directory

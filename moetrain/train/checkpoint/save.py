"""Asynchronous saves of a training run.

    begin     copy the shards that this rank writes (snapshot.py), and start to write them in a thread
    poll      state of this rank's thread, which a reduction that happens anyway sums over the ranks
    settle    act on the sum, on every rank alike: when all ranks have written, rank 0 commits in its thread;
              when that is done, too, or a rank has failed, every rank knows in the same step
    finish    wait for the save: before another one, and at the end

The thread does not communicate. A failed save changes neither the run nor the older checkpoints: every rank
removes at once what it has written, the failure is reported, and the next save tries again;
`checkpoint.max_failed_saves` failures in a row end the run. At most one save is under way.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from moetrain.checkpoint import disk
from moetrain.checkpoint.commit import commit, remove_leftovers, write_rank
from moetrain.comm.agreement import LOOK_S, all_or_none
from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import total_over
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import CheckpointError, DiskError
from moetrain.train.checkpoint.snapshot import take_snapshot
from moetrain.train.state import TrainState

log = logging.getLogger(__name__)

UNNOTICED_S = 1.0  # a shorter wait deserves no warning


class Saved(NamedTuple):
    """Outcome of a save."""

    step: int
    path: Path | None  # the checkpoint; None where the save failed
    seconds: float     # from its beginning to its end
    held_s: float      # seconds in which training waited


class SaveFlags(NamedTuple):
    """One rank's part of the save under way; summed over ranks, how many parts have ended."""

    done: int = 0                # written
    failed: int = 0              # could not be written


class Saver:
    """Saves of one run.

    Its construction is collective: rank 0 removes what killed saves left behind.

    Args:
        run_dir: directory of the run.
        mesh: all ranks.
        config: section `checkpoint`.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, config: CheckpointConfig) -> None:
        self.directory, self.mesh, self.config = (run_dir / "checkpoints").absolute(), mesh, config
        self.failed_in_a_row, self.attempt = 0, 0
        self.job: _SaveJob | None = None     # the save under way
        self.failed: _SaveJob | None = None  # the last save, if it failed
        self.began = time.monotonic()        # when the last save began, or the run
        all_or_none(mesh["batch"], lambda: remove_leftovers(run_dir.absolute()) if mesh.is_main else None)

    def begin(self, state: TrainState, facts: dict[str, object], *, final: bool = False) -> Saved | None:
        """Begin to save this step.

        Collective where it waits, which all ranks do or none.

        Args:
            state: the state to save.
            facts: how the checkpoint was made, for its manifest.
            final: wait for the save, and raise DiskError on all ranks when it fails.

        Returns:
            The outcome of a save that was waited for: this one with `final` or async_save=false, else the one
            before if it was still under way.
        """
        began = time.perf_counter()
        before = self.finish()
        if before is not None and time.perf_counter() - began > UNNOTICED_S and self.mesh.is_main:
            log.warning("step %d was to be saved while the save of step %d was still under way; "
                        "training waited %.1f s: checkpoint.interval is short for this disk",
                        state.step, before.step, time.perf_counter() - began)
        self.attempt, self.began = self.attempt + 1, time.monotonic()
        began = time.perf_counter()
        self.job = _SaveJob(state.step, began, self.directory / f"step-{state.step:08d}", self.attempt,
                        {**facts, "torch": torch.__version__, "mesh": dict(self.mesh.sizes),
                         "ranks": self.mesh["batch"].size, "time": time.time()}, state.values())
        items = take_snapshot(state, self.mesh)
        self.job.start(lambda job: write_rank(job.temporary, self.mesh.rank, items, job.step))
        self.job.held_s = time.perf_counter() - began
        return before if self.config.async_save and not final else self.finish(required=final)

    def overdue(self) -> int:
        """1 once the last save is `checkpoint.every_minutes` old, else 0.

        Clocks differ, so ranks must sum it before they act on it.
        """
        minutes = self.config.every_minutes
        return int(bool(minutes and self.job is None and time.monotonic() - self.began >= 60 * minutes))

    def poll(self) -> SaveFlags:
        """How this rank's part of the save stands; no flag while it is under way or absent.

        Sum the flags over mesh["batch"] and pass the sums to `settle`.
        """
        if self.job is None or self.job.running():
            return SaveFlags()
        return SaveFlags(done=int(self.job.error is None), failed=int(self.job.error is not None))

    def settle(self, summed: SaveFlags) -> Saved | None:
        """Act on the flags of all ranks; every rank decides alike.

        Each sum is settled once, before the next poll. Raises DiskError on all ranks when too
        many saves in a row have failed.

        Returns:
            The outcome once a save has ended.
        """
        job = self.job
        if job is None or summed.done + summed.failed < self.mesh["batch"].size:
            return None
        if summed.failed:
            return self._failed(job)
        if not job.committing:
            job.committing = True
            if self.mesh.is_main:
                job.start(self._commit)
            return None
        self.failed_in_a_row, self.failed = 0, None
        return self._ended(job, job.final)

    def finish(self, *, required: bool = False) -> Saved | None:
        """Wait for the save under way, if there is one. Collective.

        With `required`, DiskError is raised on all ranks if the last save failed.
        """
        outcome, began = None, time.perf_counter()
        while self.job is not None:
            self.job.wait(LOOK_S)
            summed = (int(total_over(self.mesh["batch"], flag)) for flag in self.poll())
            outcome = self.settle(SaveFlags(*summed))
        if required and self.failed is not None:
            self._stop(self.failed, DiskError(
                2, "the checkpoint could not be written", where=str(self.failed.final),
                why=self.failed.reason(),
                next="free space or make the directory writable, then run the same command again"))
        return outcome and outcome._replace(held_s=outcome.held_s + time.perf_counter() - began)

    def _commit(self, job: "_SaveJob") -> None:
        try:
            commit(job.temporary, job.final, ranks=self.mesh["batch"].size, facts=job.facts,
                   values=job.values, keep=self.config.keep)
        except (OSError, CheckpointError):
            _clear(job.temporary)
            raise

    def _failed(self, job: "_SaveJob") -> Saved:
        """End a save that failed on a rank, once all ranks have ended. Rank 0 removes what was written."""
        self.failed, self.failed_in_a_row = job, self.failed_in_a_row + 1
        if self.mesh.is_main:
            _clear(job.temporary)
        limit = self.config.max_failed_saves
        if job.error is not None or self.mesh.is_main:
            log.warning("the save of step %d failed (%d of %d in a row): %s; "
                        "the older checkpoints are as they were",
                        job.step, self.failed_in_a_row, limit, job.reason())
        outcome = self._ended(job, None)
        if self.failed_in_a_row >= limit:
            self._stop(job, DiskError(
                5, f"{self.failed_in_a_row} saves in a row have failed", where=str(self.directory),
                why=job.reason(),
                next="free space or make the directory writable, then run the same command again; "
                     "checkpoint.max_failed_saves sets the patience"))
        return outcome

    def _ended(self, job: "_SaveJob", path: Path | None) -> Saved:
        self.job = None
        return Saved(job.step, path, time.perf_counter() - job.began, job.held_s)

    def _stop(self, job: "_SaveJob", error: DiskError) -> None:
        """End all ranks with the code of an error; rank 0 and the ranks that know its reason raise it."""
        def stop() -> None:
            if job.error is not None or self.mesh.is_main:
                raise error

        all_or_none(self.mesh["batch"], stop)


class _SaveJob:
    """One save of this rank, with its thread. On rank 0 a second thread commits."""

    def __init__(self, step: int, began: float, final: Path, attempt: int, facts: dict[str, object],
                 values: dict[str, int]) -> None:
        self.step, self.began, self.held_s = step, began, 0.0
        self.final, self.temporary = final, final.with_name(f"{final.name}.tmp-{attempt}")
        self.facts, self.values = facts, values
        self.committing = False
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None

    def start(self, work: Callable[["_SaveJob"], None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(work,), name=f"save-{self.step}", daemon=True)
        self.thread.start()

    def _run(self, work: Callable[["_SaveJob"], None]) -> None:
        try:
            work(self)
        except Exception as error:  # it would be lost with the thread
            self.error = error
            if not isinstance(error, (OSError, CheckpointError)):
                log.exception("the save of step %d failed by a mistake in moetrain", self.step)

    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self, seconds: float) -> None:
        if self.thread is not None:
            self.thread.join(seconds)

    def reason(self) -> str:
        if self.error is None:
            return "another rank could not write; log/rank-<n>.log of the run says why"
        return str(getattr(self.error, "why", None) or getattr(self.error, "strerror", None) or self.error)


def _clear(temporary: Path) -> None:
    """Free the space of a failed save. Writers of records wait for space (runs/files.py)."""
    try:
        disk.remove_tree(temporary)
    except OSError as error:
        log.warning("%s could not be removed: %s", temporary, error)


def save(state: TrainState, run_dir: Path, mesh: Mesh, facts: dict[str, object]) -> Path:
    """Save one checkpoint and wait for it, without removing older ones. Collective.

    Raises DiskError on all ranks when it fails.

    Args:
        state: the state to save.
        run_dir: directory of the run.
        mesh: all ranks.
        facts: how the checkpoint was made, for its manifest.

    Returns:
        Directory of the checkpoint.
    """
    saver = Saver(run_dir, mesh, CheckpointConfig(keep=None, max_failed_saves=2))
    saver.begin(state, facts)
    saved = saver.finish(required=True)
    assert saved is not None and saved.path is not None, "a save that failed has raised"
    return saved.path

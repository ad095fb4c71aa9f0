"""Where the records of a step go, beside the lines of train/files.py: counts of routing, Weights & Biases.

    log/loads/*.i32    LoadsLog    tokens per expert, appended every step; loads.npz is built from it
    wandb              WandbSink   one thread that may fail or hang without anybody noticing

A resumed run cuts its files to the restored step; what is cut goes to <file>.lost and is never deleted.
"""

import atexit
import contextlib
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moetrain.train.files import append, append_lost, replacing, written

log = logging.getLogger(__name__)


# --- tokens per expert ----------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """A file of equal int32 records: the step, then loads [routers, E_max], then sources [routers, ranks, E_max]."""

    path: Path
    first: int
    routers: int
    experts: int
    ranks: int                                                   # 0: sources were not recorded

    @property
    def record_bytes(self) -> int:
        return 4 * (1 + (1 + self.ranks) * self.routers * self.experts)

    def records(self) -> np.ndarray:
        """int32 [steps, entries]; a record that was cut off is left out."""
        whole = self.path.stat().st_size // self.record_bytes * self.record_bytes
        return np.fromfile(self.path, dtype="<i4", count=whole // 4).reshape(-1, self.record_bytes // 4)


class LoadsLog:
    """Appends tokens per expert of every router, one record a step, below `dir`.

    A run that starts or resumes opens a new chunk, because the number of ranks may have changed.
    """

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self._chunk: Chunk | None = None

    def write(self, step: int, loads: Sequence[ArrayLike], sources: Sequence[ArrayLike] | None = None) -> None:
        """loads: per router [E]. sources: per router [ranks, E], the same tokens by the rank they came from."""
        loads = [np.asarray(load)[None] for load in loads]
        blocks = loads + [np.asarray(source) for source in ([] if sources is None else sources)]
        widest = max((block.shape[1] for block in loads), default=0)
        padded = [np.pad(block, ((0, 0), (0, widest - block.shape[1]))) for block in blocks]
        record = np.concatenate([np.array([step]), *(block.ravel() for block in padded)])
        assert record.max() < 2**31 and record.min() >= 0, (step, record.max(), record.min())
        ranks = len(padded[-1]) if len(padded) > len(loads) else 0
        if self._chunk is None:
            name = f"{step:08d}-{len(loads)}x{widest}-{ranks}.i32"
            self._chunk = Chunk(self.dir / name, step, len(loads), widest, ranks)
        assert 4 * record.size == self._chunk.record_bytes, "the routers and ranks of a run do not change"
        with written(self.dir):
            self.dir.mkdir(parents=True, exist_ok=True)
        append(self._chunk.path, record.astype("<i4").tobytes())

    def cut_to(self, step: int) -> None:
        """Keep the records up to this step. Call it before the first write of a run, with step 0 when there is none."""
        self._chunk = None
        for chunk in self._chunks():
            with written(chunk.path):
                data = chunk.path.read_bytes()
                kept = int((chunk.records()[:, 0] <= step).sum()) * chunk.record_bytes
                if kept < len(data):
                    append_lost(chunk.path, data[kept:])
                    os.truncate(chunk.path, kept)
                if not kept:
                    chunk.path.unlink()

    def write_npz(self, path: Path, routers: Sequence[str], experts: Sequence[int]) -> None:
        """Build loads.npz from what was appended. Entries beyond a router's experts are 0.

        sources is there when any step recorded it: -1 in steps that did not, 0 for ranks that a step did not have.
        """
        chunks = self._chunks()
        records = [chunk.records() for chunk in chunks]
        shape = (len(routers), max(experts, default=0))
        assert all((chunk.routers, chunk.experts) == shape for chunk in chunks), (shape, chunks)
        cells = shape[0] * shape[1]
        joined = np.concatenate([np.zeros((0, 1 + cells), np.int64), *(r[:, :1 + cells] for r in records)])
        arrays = {
            "loads": joined[:, 1:].reshape(len(joined), *shape),
            "experts": np.array(experts, dtype=np.int64),
            "routers": np.array(routers, dtype=np.str_),
            "steps": joined[:, 0],
        }
        ranks = max((chunk.ranks for chunk in chunks), default=0)
        if ranks:
            arrays["sources"] = np.concatenate([_sources(c, r, ranks) for c, r in zip(chunks, records)])
        with written(Path(path)), replacing(Path(path)) as file:
            np.savez(file, **arrays)

    def _chunks(self) -> list[Chunk]:
        found = [(path, re.fullmatch(r"(\d+)-(\d+)x(\d+)-(\d+)\.i32", path.name)) for path in self.dir.glob("*.i32")]
        return sorted((Chunk(path, *map(int, match.groups())) for path, match in found if match),
                      key=lambda chunk: chunk.first)


def _sources(chunk: Chunk, records: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [steps, routers, ranks, E_max] of one chunk."""
    if not chunk.ranks:
        return np.full((len(records), chunk.routers, ranks, chunk.experts), -1, dtype=np.int64)
    own = records[:, 1 + chunk.routers * chunk.experts:].reshape(-1, chunk.routers, chunk.ranks, chunk.experts)
    return np.pad(own.astype(np.int64), ((0, 0), (0, 0), (0, ranks - chunk.ranks), (0, 0)))


# --- Weights & Biases -----------------------------------------------------------------------------------------------


class WandbSink:
    """Weights & Biases in a daemon thread behind a bounded queue: import, init, log and finish all happen there.

    When it is absent, fails, hangs or does not keep up there is one warning; the run neither stops nor waits.

    dir: where the folder `wandb` goes; it also keeps the id by which a resumed run continues its curve.
    mode: online or offline. close_s: seconds that `close` waits.
    """

    def __init__(self, *, project: str, name: str, dir: Path, mode: str = "offline",
                 config: Mapping[str, Any] | None = None, close_s: float = 5.0, queue_size: int = 1000) -> None:
        self._start = {"project": project, "name": name, "dir": str(dir), "mode": mode, "config": dict(config or {})}
        self._close_s = close_s
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(queue_size)
        self._off = threading.Event()                            # takes nothing any more
        self._lock, self._warned = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand over a record with a key `step`; it is dropped when the queue is full."""
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait(dict(record))
        except queue.Full:
            self._warn("it does not keep up and records are dropped", off=False)

    def close(self) -> None:
        """Finish the run if that takes no longer than close_s; the thread is left behind otherwise."""
        deadline = time.monotonic() + self._close_s
        with contextlib.suppress(queue.Full):                    # full: it hangs
            if self._thread.is_alive():
                self._queue.put(None, timeout=self._close_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"it did not finish within {self._close_s:g} s")

    def _run(self) -> None:
        exit_hooks: list[Callable[[], Any]] = []
        try:
            os.environ.setdefault("WANDB_SILENT", "true")        # the terminal belongs to train/console.py
            with _collected_exit_hooks(exit_hooks):
                import wandb

                run = _start_wandb(wandb, **self._start)
            while (record := self._queue.get()) is not None:
                run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])
            run.finish()
            for hook in reversed(exit_hooks):
                hook()
        except BaseException as error:                           # it may even call sys.exit
            self._warn(f"{type(error).__name__}: {error}".strip().splitlines()[0])

    def _warn(self, reason: str, *, off: bool = True) -> None:
        """Once: what comes later is a consequence."""
        with self._lock:
            warned, self._warned = self._warned, True
        if off:
            self._off.set()
        if not warned:
            log.warning("wandb: %s; the run goes on, metrics.jsonl has everything", reason)


def _start_wandb(wandb: Any, *, dir: str, mode: str, **run: Any) -> Any:
    if mode == "online" and not _has_credentials(wandb):
        raise RuntimeError("no API key (`wandb login` stores one, log.wandb=offline needs none)")
    id_file = Path(dir) / "wandb" / "id"
    id_file.parent.mkdir(parents=True, exist_ok=True)
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    return wandb.init(**run, dir=dir, mode=mode, id=id_file.read_text(encoding="utf-8"), resume="allow",
                      settings=wandb.Settings(console="off", silent=True))


def _has_credentials(wandb: Any) -> bool:
    """Never asks at the terminal."""
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:                                            # older releases have no `prompt`
        return wandb.api.api_key is not None


@contextlib.contextmanager
def _collected_exit_hooks(hooks: list[Callable[[], Any]]) -> Iterator[None]:
    """Collect what this thread would register with atexit: such a hook waits for uploads, for ever if need be."""
    register, thread = atexit.register, threading.get_ident()

    def collect(function: Callable, *args: Any, **kwargs: Any) -> Callable:
        if threading.get_ident() != thread:
            return register(function, *args, **kwargs)
        hooks.append(lambda: function(*args, **kwargs))
        return function

    atexit.register = collect
    try:
        yield
    finally:
        atexit.register = register

"""Where the records of a step go, beside the lines of train/files.py: counts of routing, Weights & Biases.

    log/loads/*.i32    LoadsLog    tokens per expert, appended every step; loads.npz is built from it
    wandb              WandbSink   one thread that may fail or hang without anybody noticing

A resumed run cuts its files to the restored step; what is cut goes to <file>.lost and is never deleted.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import re
import secrets
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moetrain.files import create, open_descriptor, open_regular, read_json, read_text, reason
from moetrain.train.files import append, move_to_lost, replacing, written
from moetrain.train.loggers.wandb_settings import WandbSettings

log = logging.getLogger(__name__)


ROUTERS = "routers.json"
BLOCK_BYTES = 16 << 20       # of records that are read at once


# --- tokens per expert ----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Records in memory, int64."""

    steps: np.ndarray                                            # [n]
    loads: np.ndarray                                            # [n, routers, E_max]
    sources: np.ndarray                                          # [n, routers, ranks, E_max]


class Chunk(NamedTuple):
    """A file of equal int32 records: the step, then loads [routers, E_max], then sources [routers, ranks, E_max].

    Records are those of consecutive steps, from `first` on.
    """

    path: Path
    first: int
    routers: int
    experts: int
    ranks: int                                                   # 0: sources were not recorded

    @property
    def record_bytes(self) -> int:
        return 4 * (1 + (1 + self.ranks) * self.routers * self.experts)

    def records(self) -> int:
        """Whole records that are there now."""
        return self.path.stat().st_size // self.record_bytes

    def blocks(self, records: int) -> Iterator[Block]:
        """The first `records` of them, a few at a time, without those that were altered."""
        cells, many = self.routers * self.experts, max(1, BLOCK_BYTES // self.record_bytes)
        with open_regular(self.path, links=False) as file:
            for begin in range(0, records, many):
                count = min(many, records - begin)
                rows = np.frombuffer(file.read(count * self.record_bytes), "<i4").reshape(count, -1).astype(np.int64)
                rows = rows[(rows[:, 0] == np.arange(count) + self.first + begin) & (rows >= 0).all(1)]
                yield Block(rows[:, 0], rows[:, 1:1 + cells].reshape(len(rows), self.routers, self.experts),
                            rows[:, 1 + cells:].reshape(len(rows), self.routers, self.ranks, self.experts))


class LoadsLog:
    """Tokens per expert of every router below `dir`, one record a step, and the names of the routers.

    A run that starts or resumes opens a new chunk, because the number of ranks may have changed. A step adds its own record
    and nothing else; loads.npz, which holds them all, is built when somebody wants it.
    """

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self._chunk: Chunk | None = None

    def name_routers(self, experts: Mapping[str, int]) -> None:
        """Keep what the records do not say: the routers in layer order, and how many experts each has."""
        path = self.dir / ROUTERS
        with written(path):
            self.dir.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(json.dumps(experts).encode())

    def write(self, step: int, loads: Sequence[ArrayLike], sources: Sequence[ArrayLike] | None = None) -> None:
        """loads: per router [E]. sources: per router [ranks, E], the same tokens by the rank they came from."""
        loads = [np.asarray(load)[None] for load in loads]
        blocks = loads + [np.asarray(source) for source in ([] if sources is None else sources)]
        widest = max((block.shape[1] for block in blocks), default=0)
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
            with written(chunk.path), open(open_descriptor(chunk.path, os.O_RDWR, links=False), "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                kept = min(max(0, step + 1 - chunk.first), size // chunk.record_bytes) * chunk.record_bytes
                if kept < size:
                    move_to_lost(chunk.path, file, [(kept, size)])
                    file.truncate(kept)
            if not kept:
                chunk.path.unlink()

    def write_npz(self, path: Path) -> bool:
        """Build loads.npz from what was recorded, a few records at a time; False where there is nothing of that kind.

        OSError where it cannot be written. Entries beyond a router's experts are 0. sources is there when any
        step recorded it: -1 in steps that did not, 0 for ranks that a step did not have.
        """
        experts = self._routers()
        if experts is None:
            return False
        shape = (len(experts), max(experts.values(), default=0))
        chunks = {chunk: chunk.records() for chunk in self._chunks() if (chunk.routers, chunk.experts) == shape}
        ranks = max((chunk.ranks for chunk in chunks), default=0)
        steps = np.concatenate([np.zeros(0, np.int64), *(block.steps for _, block in _in_order(chunks))])
        if len(steps) < sum(chunks.values()):
            log.warning("%s: %d records are damaged and left out", self.dir, sum(chunks.values()) - len(steps))
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            _add(archive, "loads", (len(steps), *shape), (block.loads for _, block in _in_order(chunks)))
            if ranks:
                _add(archive, "sources", (len(steps), shape[0], ranks, shape[1]),
                     (_by_rank(block.sources, chunk, ranks) for chunk, block in _in_order(chunks)))
            for name, array in (("experts", np.array(list(experts.values()), np.int64)),
                                ("routers", np.array(list(experts), np.str_)), ("steps", steps)):
                _add(archive, name, array.shape, [array], array.dtype)
        return True

    def is_built(self, path: Path) -> bool:
        """Whether loads.npz is there and nothing was recorded after it was built."""
        newest = max((chunk.path.stat().st_mtime_ns for chunk in self._chunks()), default=0)
        return path.is_file() and path.stat().st_mtime_ns >= newest

    def _routers(self) -> dict[str, int] | None:
        """Experts by router; None where nobody has kept that, as in runs of older releases."""
        path = self.dir / ROUTERS
        try:
            found = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s); loads.npz stays as it is", path, reason(error))
            return None
        fits = isinstance(found, dict) and all(type(number) is int and 0 < number < 1 << 20 for number in found.values())
        return found if fits else None

    def _chunks(self) -> list[Chunk]:
        found = [(path, re.fullmatch(r"(\d{8,12})-(\d{1,6})x(\d{1,6})-(\d{1,6})\.i32", path.name)) for path in self.dir.glob("*.i32")]
        return sorted((Chunk(path, *map(int, match.groups())) for path, match in found if match and _is_plain(path)),
                      key=lambda chunk: chunk.first)


def _is_plain(path: Path) -> bool:
    """Whether it is a file that can be ours: no folder or pipe, and no link, which would be written to elsewhere."""
    plain = stat.S_ISREG(path.lstat().st_mode)
    if not plain:
        log.warning("%s is not a file of the run; it is left alone", path)
    return plain


def _in_order(chunks: Mapping[Chunk, int]) -> Iterator[tuple[Chunk, Block]]:
    """The records of all chunks, of which so many are read, each step once."""
    last = -1
    for chunk, records in chunks.items():
        for block in chunk.blocks(records):
            block = Block(*(array[block.steps > last] for array in block))
            last = max([last, *block.steps[-1:].tolist()])
            yield chunk, block


def _add(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray],
         dtype: np.dtype = np.dtype("<i8")) -> None:
    """An array of the archive, from blocks of its rows: never more of it in memory than one of them."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).tobytes())


def _by_rank(sources: np.ndarray, chunk: Chunk, ranks: int) -> np.ndarray:
    """[steps, routers, ranks, E_max] of records of a chunk."""
    if not chunk.ranks:
        return np.full((len(sources), chunk.routers, ranks, chunk.experts), -1, dtype=np.int64)
    return np.pad(sources, ((0, 0), (0, 0), (0, ranks - chunk.ranks), (0, 0)))


# --- Weights & Biases -----------------------------------------------------------------------------------------------


class WandbSink:
    """Weights & Biases in a daemon thread behind a bounded queue: import, init, log and finish all happen there.

    When it is absent, fails, hangs or does not keep up there is one warning; the run neither stops nor waits.

    dir: where the folder `wandb` goes; it also keeps the id by which a resumed run continues its curve.
    close_s: seconds that `close` waits.
    """

    def __init__(self, settings: WandbSettings, *, dir: Path, config: Mapping[str, Any] | None = None, close_s: float = 5.0,
                 queue_size: int = 1000) -> None:
        self._start = {**settings._asdict(), "dir": str(dir), "config": dict(config or {})}
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
        with create(id_file) as file:
            file.write(secrets.token_hex(4).encode())
    return wandb.init(**run, dir=dir, mode=mode, id=read_text(id_file), resume="allow",
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

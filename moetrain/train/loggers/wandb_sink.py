"""Log records for Weights & Biases, sent by one thread that may fail or hang without stopping the run."""

import atexit
import contextlib
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moetrain.files import create, read_text
from moetrain.train.loggers.wandb_settings import WandbSettings

log = logging.getLogger(__name__)


class WandbSink:
    """Weights & Biases in a daemon thread behind a bounded queue, with import, init, log and finish.

    When it is missing, fails, hangs or falls behind, there is one warning; the run neither stops nor waits.

    Args:
        settings: arguments of `wandb.init`.
        dir: parent of the folder `wandb`, which also stores the id with which a resumed run
            continues its curves.
        config: the run's config, to be shown there.
        close_s: seconds that `close` waits.
        queue_size: records that may wait.
    """

    def __init__(self, settings: WandbSettings, *, dir: Path, config: Mapping[str, Any] | None = None,
                 close_s: float = 5.0, queue_size: int = 1000) -> None:
        self._start = {**settings._asdict(), "dir": str(dir), "config": dict(config or {})}
        self._close_s = close_s
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(queue_size)
        self._off = threading.Event()  # records are not accepted any more
        self._lock, self._warned = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Queue a record with a key `step`; it is dropped when the queue is full."""
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait(dict(record))
        except queue.Full:
            self._warn("it does not keep up and records are dropped", off=False)

    def close(self) -> None:
        """Finish the run within close_s; otherwise leave the thread behind."""
        deadline = time.monotonic() + self._close_s
        with contextlib.suppress(queue.Full):  # it hangs where the queue stays full
            if self._thread.is_alive():
                self._queue.put(None, timeout=self._close_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"it did not finish within {self._close_s:g} s")

    def _run(self) -> None:
        exit_hooks: list[Callable[[], Any]] = []
        try:
            os.environ.setdefault("WANDB_SILENT", "true")  # the terminal belongs to train/loggers/console.py
            with _collected_exit_hooks(exit_hooks):
                import wandb

                run = _start_wandb(wandb, **self._start)
            while (record := self._queue.get()) is not None:
                run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])
            run.finish()
            for hook in reversed(exit_hooks):
                hook()
        except BaseException as error:  # wandb may even call sys.exit
            self._warn(f"{type(error).__name__}: {error}".strip().splitlines()[0])

    def _warn(self, reason: str, *, off: bool = True) -> None:
        """Warn once: later failures are consequences of the first."""
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
    """Whether an API key is stored. Never prompts on the terminal."""
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # older releases have no `prompt`
        return wandb.api.api_key is not None


@contextlib.contextmanager
def _collected_exit_hooks(hooks: list[Callable[[], Any]]) -> Iterator[None]:
    """Collect what this thread registers with atexit: at exit such hooks could wait forever for uploads."""
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

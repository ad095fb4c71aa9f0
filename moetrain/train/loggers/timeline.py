"""Profiler traces of a few steps (log.timeline).

Every rank writes log/timeline/step-NNNNNNNN/rank-NNNN.json: every operator, kernel and collective with
its times, in the format of Perfetto (ui.perfetto.dev) and chrome://tracing. Ranges name the phases of a
step and the parts of the model:

    forward   layers.N   layers.N.attention   layers.N.moe   head    of one micro-batch
    counts: post   counts: wait                                      all-reduce of counts (count_pool.py)
    loss   backward   reduce   optimizer

The first step of an attempt, which allocates memory and opens connections, is never recorded. A recorded step
is slower than others. `moetrain report` sums the records up (report/timeline.py).
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.comm.agreement import on_all
from moetrain.comm.mesh import Mesh
from moetrain.config.schema import LogConfig
from moetrain.errors import DiskError
from moetrain.files import open_regular
from moetrain.model.transformer import Transformer
from moetrain.runs.files import prepare_rank_file


class Timeline:
    """Recorder of the steps that log.timeline and log.timeline_start select.

    Args:
        run_dir: directory of the run.
        mesh: all ranks.
        config: section `log`.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, config: LogConfig) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keep the profiler's own messages off the terminal
        self.directory, self.mesh = run_dir / "log" / "timeline", mesh
        self.left, self.start, self.first = config.timeline, config.timeline_start, True

    @contextmanager
    def step(self, step: int, model: Transformer) -> Iterator[None]:
        """Record the step that runs inside the block, if it is selected.

        Collective: a directory that cannot be written ends all ranks.
        """
        first, self.first = self.first, False
        if first or not self.left or step < self.start:
            yield
            return
        self.left -= 1
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (self.mesh.device.type == "cuda")]
        with profile(activities=kinds) as recorded, _named(model):
            yield
        path = self.directory / f"step-{step:08d}" / f"rank-{self.mesh.rank:04d}.json"
        on_all(self.mesh, lambda: _write(recorded, path, self.mesh), lambda why: DiskError(
            20, "a record of the run cannot be written", where=str(path), why=why,
            next="free space there, or log.timeline=0; the same command resumes"))


def _write(recorded: profile, path: Path, mesh: Mesh) -> None:
    prepare_rank_file(path, mesh.rank, mesh.size)
    part = path.with_suffix(".part")
    recorded.export_chrome_trace(str(part))
    # The profiler does not report a failed or incomplete write, and leaves files with names of
    # its own behind.
    if not _is_whole(part):
        for left in path.parent.glob(f"{part.name}*"):
            left.unlink()
        raise OSError(f"torch's profiler could not write {path.name} as a whole")
    part.replace(path)


def _is_whole(path: Path) -> bool:
    """Whether a JSON file ends with the end of an object."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100))
            return file.read().rstrip().endswith(b"}")
    except FileNotFoundError:
        return False


@contextmanager
def _named(model: Transformer) -> Iterator[None]:
    """Add ranges for the parts of the model; attention and MoE have them when they are recomputed, too."""
    with ExitStack() as hooks:
        paths = [*(f"layers.{index}" for index in range(len(model.layers))),
                 *(f"mtp.{index}" for index in range(len(model.mtp)))]
        for path, block in zip(paths, model.blocks):
            for name, module in (("", block), (".attention", block.attention), (".moe", block.moe)):
                if module is not None:
                    _enclose(module, f"{path}{name}", hooks)
        yield


def _enclose(module: nn.Module, name: str, hooks: ExitStack) -> None:
    opened: list[record_function] = []

    def enter(module: nn.Module, arguments: tuple) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def leave(module: nn.Module, arguments: tuple, output: object) -> None:
        opened.pop().__exit__(None, None, None)

    hooks.callback(module.register_forward_pre_hook(enter).remove)
    hooks.callback(module.register_forward_hook(leave).remove)

"""One process's part in a run, around the training:

its place among the ranks, the run's directory, signals, failed peers.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from moetrain.checkpoint.manifest import newest, step_of
from moetrain.comm.agreement import all_or_none
from moetrain.comm.device import pick_device, take_device
from moetrain.comm.failures import peer_lost, silent_ranks
from moetrain.comm.mesh import Mesh, build_mesh, connect, disconnect, mesh_sizes
from moetrain.comm.reduce import largest_over
from moetrain.config.build import check_composed
from moetrain.config.compose import run_dir
from moetrain.config.schema import Config
from moetrain.errors import ConfigError, MoETrainError, PeerError, Preempted
from moetrain.model.build import computes_bfloat16
from moetrain.plan.precision import choose_dtype
from moetrain.runs.attempts import RunAttempts
from moetrain.runs.completion import last_step, newest_sound_checkpoint, trained_config
from moetrain.train.memory.out_of_memory import out_of_memory_named
from moetrain.train.preemption import Preemption, cause, startup_signals
from moetrain.train.state import Run


def join_run(config: Config) -> tuple[Config, Path, Mesh]:
    """Check the config, take this process's place among the ranks, and settle the dtype.

    Returns:
        The config with its dtype settled, the directory of the run, and the mesh.
    """
    check_composed(config)
    check_alone(config)
    directory = run_dir(config)
    mesh = join(config)
    return with_dtype(config, directory, mesh), directory, mesh


def check_alone(config: Config) -> None:
    """Raise ConfigError if the run wants several processes and no launcher has started them."""
    if config.run.nproc > 1 and "RANK" not in os.environ and not dist.is_initialized():
        raise ConfigError(125, f"run.nproc={config.run.nproc}, and this process is alone", where="run.nproc",
                          why="train() is one rank and starts no others, and no launcher has set RANK",
                          next="moetrain.launch.train_on_ranks([...]) with the same overrides; or run.nproc=1")


def join(config: Config) -> Mesh:
    """Take this process's place: device, process group (unless `parallel=single`), mesh. Collective.

    The environment (torchrun, launch/local.py) says which rank this is. `single`, and a run that nobody
    launched, have no process group.
    """
    device = pick_device(config)
    take_device(device)
    if config.parallel.mode != "single" and "RANK" in os.environ and not dist.is_initialized():
        if config.run.share_gpu:
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")     # read by torch for exchange=peer
        connect(device, config.run.timeout_s, over_host=config.run.share_gpu)
    world = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(mesh_sizes(config.parallel.mode, world, config.parallel.ep, config.parallel.shard), device)


def with_dtype(config: Config, directory: Path, mesh: Mesh) -> Config:
    """Settle run.dtype=auto:

    the dtype of the checkpoint, or one that all ranks compute in. Collective if it is auto.
    """
    if config.run.dtype != "auto":
        return config
    without = largest_over(mesh["batch"], float(not computes_bfloat16(mesh.device)))
    dtype = choose_dtype("auto", mesh.device.type, computes_bfloat16=not without, recorded=_recorded(directory))
    return replace(config, run=replace(config.run, dtype=dtype))


def _recorded(directory: Path) -> str | None:
    """Dtype that the newest checkpoint was trained with; None for a new run."""
    checkpoint = newest_sound_checkpoint(directory)
    return None if checkpoint is None else trained_config(directory, checkpoint).run.dtype


class Session:
    """An attempt at a run, from the lock on its directory to its recorded end.

    Args:
        directory: of the run.
        mesh: of the run.
        record_end: records the exit code of this attempt.
        on_exit: called with exit code and reason before the process leaves at once, without an orderly end.
    """

    def __init__(self, directory: Path, mesh: Mesh, record_end: Callable[[int], None],
                 on_exit: Callable[[int, str], None]) -> None:
        self.directory, self.mesh, self._record_end, self._on_exit = directory, mesh, record_end, on_exit

    @contextmanager
    def training(self, run: Run) -> Iterator[Preemption]:
        """Around the steps of a run: signals ask for a save, and memory that runs out is explained."""
        preemption = Preemption(grace_s=run.config.run.grace_s, leaving=self._leave)
        with preemption, out_of_memory_named(run):
            yield preemption

    def preempted(self, run: Run, requested: int | None, again: str) -> Preempted:
        """Leave the process group and make the error of a run that was told to stop. All ranks call it at the
        same step.

        Args:
            run: saved.
            requested: signal that asked this rank to stop; None if another rank was asked.
            again: what to type to go on.
        """
        disconnect()                                     # all ranks leave here, so none tears down what another uses
        return Preempted(1, f"told to stop: saved after step {run.state.step} of {last_step(run.config)}",
                         where=str(self.directory),
                         why=f"{cause(requested) if requested else 'another rank'} asked for it", next=again)

    def _leave(self, code: int, reason: str) -> None:
        self._record_end(code)
        self._on_exit(code, reason)


@contextmanager
def session(directory: Path, mesh: Mesh, on_exit: Callable[[int, str], None]) -> Iterator[Session]:
    """Hold the lock on a run's directory, record this attempt and how it ends, and name a rank that is lost.

    Args:
        directory: of the run.
        mesh: of the run.
        on_exit: see `Session`.
    """
    with recorded_attempt(directory, mesh) as record_end, lost_peers_named(mesh):
        yield Session(directory, mesh, record_end, on_exit)


@contextmanager
def recorded_attempt(directory: Path, mesh: Mesh) -> Iterator[Callable[[int], None]]:
    """Lock the run's directory and record this attempt and its end. Yields a function that records an end."""
    with ExitStack() as stack:
        attempts = RunAttempts(directory) if mesh.is_main else None
        end = attempts.end if attempts else lambda code: None

        def enter() -> None:
            if attempts:
                stack.enter_context(startup_signals())        # the ranks that keep no record may go as they are
                stack.enter_context(attempts)
                checkpoint = newest(directory)
                attempts.begin(step_of(checkpoint) if checkpoint else 0)

        all_or_none(mesh["batch"], enter)
        try:
            yield end
        except BaseException as error:
            code = error.code if isinstance(error, (MoETrainError, SystemExit)) else 1
            end(130 if isinstance(error, KeyboardInterrupt) else code)
            raise
        end(0)


@contextmanager
def lost_peers_named(mesh: Mesh) -> Iterator[None]:
    """Turn the failure of a collective whose peer is gone or did not answer in time into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if not peer_lost(error):
            raise
        silent = silent_ranks(error)
        who = f"rank {silent}, which does not answer" if silent else "a rank that is gone or does not answer"
        raise PeerError(1, f"rank {mesh.rank} waited for {who}", where="a collective", why=str(error).splitlines()[0],
                        next="see log/rank-<n>.log of the others for the first failure; the same command resumes") from error

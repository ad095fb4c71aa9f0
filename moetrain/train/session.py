"""Everything around the training loop of one process.

    join_run    device, process group and mesh of this rank; dtype of the run
    session     lock on the run's directory, record of the attempt, errors that name a lost peer
    Session     signals while steps run, and the end of a preempted run
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
from moetrain.errors import ConfigError, PeerError, Preempted, exit_code
from moetrain.model.build import ConvertModel, check_model, computes_bfloat16
from moetrain.plan.precision import choose_dtype
from moetrain.runs.attempts import RunAttempts
from moetrain.runs.completion import last_step, newest_sound_checkpoint, trained_config
from moetrain.train.initial_weights import with_initial_weights
from moetrain.train.memory.out_of_memory import out_of_memory_named
from moetrain.train.preemption import Preemption, cause, startup_signals
from moetrain.train.state import Run


def join_run(config: Config, convert_model: ConvertModel | None = None) -> tuple[Config, Path, Mesh]:
    """Check config and model, join the process group, and resolve `run.dtype=auto`. Collective.

    Args:
        config: composed and checked.
        convert_model: changes the model before it is sharded (model/build.py).

    Returns:
        The config with a concrete dtype and resolved weights, the directory of the run, and the mesh.
    """
    check_composed(config)
    check_alone(config)
    check_model(config, convert_model)
    directory = run_dir(config)
    config = with_initial_weights(config, directory, convert_model)
    mesh = join(config)
    return with_dtype(config, directory, mesh), directory, mesh


def check_alone(config: Config) -> None:
    """Raise ConfigError if `run.nproc` asks for several processes and no launcher has started them."""
    if config.run.nproc > 1 and "RANK" not in os.environ and not dist.is_initialized():
        raise ConfigError(
            125, f"run.nproc={config.run.nproc}, and this process is alone", where="run.nproc",
            why="train() is one rank and starts no others, and no launcher has set RANK",
            next="moetrain.launch.train_on_ranks([...]) with the same overrides, or main(convert_model=...) "
                 "(docs/howto/python.md); or run.nproc=1")


def join(config: Config) -> Mesh:
    """Choose the device, join the process group, and build the mesh. Collective.

    The launcher (torchrun, launch/local.py) sets this process's rank in the environment. There is no process
    group with `parallel=single`, nor without a launcher.
    """
    device = pick_device(config)
    take_device(device)
    if config.parallel.mode != "single" and "RANK" in os.environ and not dist.is_initialized():
        if config.run.share_gpu:
            # Read by torch for exchange=peer.
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        connect(device, config.run.timeout_s, over_host=config.run.share_gpu)
    world = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(
        mesh_sizes(config.parallel.mode, world, config.parallel.ep, config.parallel.shard), device)


def with_dtype(config: Config, directory: Path, mesh: Mesh) -> Config:
    """Replace `run.dtype=auto` by a concrete dtype. Collective if it is auto.

    A resumed run keeps the dtype of its newest checkpoint. A new one takes bfloat16 only if the hardware of
    every rank computes it (plan/precision.py).

    Args:
        config: the config of the run.
        directory: directory of the run, where a checkpoint is looked for.
        mesh: all ranks, which take the same dtype.
    """
    if config.run.dtype != "auto":
        return config
    without = largest_over(mesh["batch"], float(not computes_bfloat16(mesh.device)))
    dtype = choose_dtype("auto", mesh.device.type, computes_bfloat16=not without,
                         recorded=_recorded(directory))
    return replace(config, run=replace(config.run, dtype=dtype))


def _recorded(directory: Path) -> str | None:
    """Dtype that the newest sound checkpoint was trained with; None for a new run."""
    checkpoint = newest_sound_checkpoint(directory)
    return None if checkpoint is None else trained_config(directory, checkpoint).run.dtype


class Session:
    """One attempt at a run, from the lock on its directory to its recorded end. Made by `session`.

    Args:
        directory: directory of the run.
        record_end: records the exit code of this attempt.
        on_exit: called with exit code and reason before the process exits at once, without unwinding.
    """

    def __init__(self, directory: Path, record_end: Callable[[int], None],
                 on_exit: Callable[[int, str], None]) -> None:
        self.directory, self._record_end, self._on_exit = directory, record_end, on_exit

    @contextmanager
    def training(self, run: Run) -> Iterator[Preemption]:
        """Context of the training steps: signals request a save, out-of-memory errors are explained.

        Args:
            run: the run, for its grace period and for the explanation.

        Yields:
            The state of preemption, which the loop reads at every step.
        """
        preemption = Preemption(grace_s=run.config.run.grace_s, leaving=self._leave)
        with preemption, out_of_memory_named(run):
            yield preemption

    def preempted(self, run: Run, requested: int | None, again: str) -> Preempted:
        """Leave the process group and return the error of a preempted run.

        All ranks call it after the same step, so none tears down a connection that another still uses.

        Args:
            run: the run, already saved.
            requested: signal that this rank received; None if only another rank received one.
            again: how to resume the run; the advice of the error.

        Returns:
            The error, for the caller to raise.
        """
        disconnect()
        return Preempted(1, f"told to stop: saved after step {run.state.step} of {last_step(run.config)}",
                         where=str(self.directory),
                         why=f"{cause(requested) if requested else 'another rank'} asked for it", next=again)

    def _leave(self, code: int, reason: str) -> None:
        self._record_end(code)
        self._on_exit(code, reason)


@contextmanager
def session(directory: Path, mesh: Mesh, on_exit: Callable[[int, str], None]) -> Iterator[Session]:
    """Hold the lock on a run's directory, record the attempt and its end, and name a peer that is lost.

    Args:
        directory: directory of the run.
        mesh: all ranks.
        on_exit: called with exit code and reason before the process exits at once, without unwinding.

    Yields:
        The attempt.
    """
    with recorded_attempt(directory, mesh) as record_end, lost_peers_named(mesh):
        yield Session(directory, record_end, on_exit)


@contextmanager
def recorded_attempt(directory: Path, mesh: Mesh) -> Iterator[Callable[[int], None]]:
    """Lock the run's directory and record this attempt and its end, on rank 0. Collective.

    Where rank 0 cannot take the lock, no rank goes on.

    Yields:
        A function that records an exit code; for a process that exits without unwinding.
    """
    with ExitStack() as stack:
        attempts = RunAttempts(directory) if mesh.is_main else None
        end = attempts.end if attempts else lambda code: None

        def enter() -> None:
            if attempts:
                # Other ranks have no record to complete, so the default handlers suffice there.
                stack.enter_context(startup_signals())
                stack.enter_context(attempts)
                checkpoint = newest(directory)
                attempts.begin(step_of(checkpoint) if checkpoint else 0)

        all_or_none(mesh["batch"], enter)
        try:
            yield end
        except BaseException as error:
            end(exit_code(error))
            raise
        end(0)


@contextmanager
def lost_peers_named(mesh: Mesh) -> Iterator[None]:
    """Convert the failure of a collective into a PeerError if a peer has exited or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not peer_lost(error):
            raise
        silent = silent_ranks(error)
        who = f"rank {silent}, which does not answer" if silent else "a rank that is gone or does not answer"
        raise PeerError(
            1, f"rank {mesh.rank} waited for {who}", where="a collective", why=str(error).splitlines()[0],
            next="see log/rank-<n>.log of the others for the first failure; the same command resumes",
        ) from error

"""Check, before the first step, that the checkpoints of a run fit on the disk and can be written."""

import logging
import shutil
from pathlib import Path

from moetrain.checkpoint import disk
from moetrain.comm.agreement import all_or_none
from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import total_over
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import DiskError
from moetrain.files import read_bytes
from moetrain.train.checkpoint.layout import shards_to_write
from moetrain.train.state import TrainState
from moetrain.units import decimal

log = logging.getLogger(__name__)

PROBE = b"moetrain"


def check_disk(state: TrainState, run_dir: Path, mesh: Mesh, config: CheckpointConfig, steps: int) -> int:
    """Check that the run's checkpoints fit and can be written; else DiskError on all ranks. Collective.

    The run needs room for `keep` checkpoints and the one that is being written. With every_minutes any step
    may save, and how many will is unknown, so with keep=null only the saves of the interval count.

    Args:
        state: state that will be saved.
        run_dir: directory of the run.
        mesh: all ranks.
        config: section `checkpoint`.
        steps: number of steps that the run will take.

    Returns:
        Bytes of one checkpoint.
    """
    size = estimate(state, mesh)
    saves = -(-steps // config.interval) if config.interval else min(1, steps)
    if config.keep:
        saves = min(steps if config.every_minutes else saves, config.keep + 1)
    all_or_none(mesh["batch"], lambda: _check(run_dir / "checkpoints", saves, size) if mesh.is_main else None)
    return size


def estimate(state: TrainState, mesh: Mesh) -> int:
    """Estimate the bytes of a checkpoint: all tensors, each with 200 of header and manifest. Collective."""
    state_shards = shards_to_write(state.state_shards(), mesh)
    own = sum(shard.rows.numel() * shard.rows.element_size() + 200 for shard in state_shards)
    return int(total_over(mesh["batch"], own))


def _check(directory: Path, copies: int, size: int) -> None:
    try:
        _probe(directory)
        free = shutil.disk_usage(directory).free
        existing = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except OSError as error:
        raise DiskError(4, "checkpoints cannot be written", where=str(directory),
                        why=str(error.strerror or error),
                        next="make it writable, or choose another place with run.dir") from error
    if free + existing < copies * size:
        raise DiskError(6, "there is no room for the checkpoints of the run", where=str(directory),
                        why=f"{copies} of {decimal(size, 'B')} each need {decimal(copies * size, 'B')}; "
                            f"{decimal(free + existing, 'B')} are free or taken by its older ones",
                        next="free space, choose another place with run.dir, or lower checkpoint.keep")


def _probe(directory: Path) -> None:
    """Write a tiny file and read it back."""
    disk.make_directory(directory)
    path = directory / ".probe"
    path.unlink(missing_ok=True)
    with disk.new_file(path) as append:
        append(PROBE)
    if read_bytes(path, limit=len(PROBE), links=False) != PROBE:
        raise OSError("a file that was written reads differently")
    disk.remove(path)

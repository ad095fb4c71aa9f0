"""Loading of checkpoints: every rank reads the rows that it holds, by name, whatever mesh has written them.

    load                 load one checkpoint into a state
    resume               load the newest sound checkpoint, the same one on every rank
    load_newest_model    the same for the model alone
    load_weights         the model alone from one checkpoint, of whatever run
    newest_manifest      read the newest valid manifest, without checking its files

Everything that this rank will read is compared with its checksums before the state is changed,
and nothing is unpickled.
"""

import logging
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from moetrain.checkpoint.commit import set_aside
from moetrain.checkpoint.compare import readable_as
from moetrain.checkpoint.digest import WEIGHTS
from moetrain.checkpoint.manifest import NAME, checkpoints_of, damaged, is_damage, read_manifest, step_of
from moetrain.checkpoint.payload import Payload
from moetrain.checkpoint.records import ByteRange, Manifest, TensorEntry, row_bytes
from moetrain.checkpoint.verify import check_files, problems
from moetrain.comm.agreement import all_or_none, fail_together, on_first
from moetrain.comm.mesh import Group, Mesh
from moetrain.comm.reduce import largest_over, sum_over
from moetrain.errors import CheckpointError
from moetrain.model.transformer import Transformer
from moetrain.ops.pinned import to_device
from moetrain.parallel.state_shards import DTYPE_NAMES, DTYPES, StateShard, weights
from moetrain.train.checkpoint.layout import Read, plan_reads
from moetrain.train.state import OPTIONAL, TrainState

log = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """A checkpoint that was loaded."""

    path: Path
    manifest: Manifest
    lost: int  # steps between it and the newest damaged one


def load(state: TrainState, directory: Path, *, verify: str = "full", mesh: Mesh | None = None) -> Manifest:
    """Load a checkpoint into a state, optimizer included. Collective with a mesh.

    Args:
        state: the state to fill.
        directory: of the checkpoint.
        verify: `full` compares checksums, `sizes` only sizes and headers.
        mesh: all ranks, which check together that some rank has a place for every tensor of the
            checkpoint. None checks nothing.
    """
    loader = CheckpointLoader(state.state_shards(), directory, verify)
    _load(loader, mesh)
    state.restore(loader.manifest.values)
    return loader.manifest


def resume(state: TrainState, run_dir: Path, mesh: Mesh, *, verify: str = "full") -> Resumed | None:
    """Load the newest sound checkpoint of a run into a state. Collective.

    When a rank finds damage, all ranks take the next older checkpoint; rank 0 logs what was lost
    and sets the damaged checkpoint aside. Raises CheckpointError where no checkpoint is sound, or
    where they are of another model.

    Args:
        state: the state to fill.
        run_dir: directory of the run.
        mesh: all ranks.
        verify: `full` compares checksums, `sizes` only sizes and headers.

    Returns:
        The loaded checkpoint; None where the run has none.
    """
    found = _load_newest_sound(
        run_dir, mesh, lambda directory: CheckpointLoader(state.state_shards(), directory, verify),
        move_aside=True)
    if found is not None:
        state.restore(found.manifest.values)
    return found


def load_newest_model(model: Transformer, run_dir: Path, mesh: Mesh, *,
                      verify: str = "full") -> Resumed | None:
    """Load the newest sound checkpoint into a model, and change nothing on the disk. Collective.

    Args:
        model: the model to fill.
        run_dir: directory of the run.
        mesh: all ranks.
        verify: as in `resume`.
    """
    return _load_newest_sound(
        run_dir, mesh, lambda directory: CheckpointLoader(weights(model), directory, verify, WEIGHTS),
        move_aside=False)


def load_weights(model: Transformer, directory: Path, mesh: Mesh, *, verify: str = "full",
                 without: tuple[str, ...] = ()) -> Manifest:
    """Load the weights of one checkpoint into a model. Collective: all ranks raise what one of them finds.

    Args:
        model: the model to fill.
        directory: of the checkpoint.
        mesh: all ranks.
        verify: as in `resume`.
        without: beginnings of the names of tensors that only the model or only the checkpoint has.
    """
    batch = mesh["batch"]
    loader = all_or_none(
        batch, lambda: CheckpointLoader(weights(model), directory, verify, WEIGHTS, without))
    all_or_none(batch, loader.verify)
    _check_same_manifest(batch, loader)
    _check_all_claimed(mesh, loader)
    all_or_none(batch, loader.fill)
    return loader.manifest


def newest_manifest(run_dir: Path) -> Manifest:
    """Read the manifest of the newest checkpoint that has a valid one; CheckpointError where none has."""
    passed_over: list[tuple[Path, CheckpointError | None]] = []
    for directory in reversed(checkpoints_of(run_dir)):
        try:
            return read_manifest(directory)
        except CheckpointError as error:
            passed_over.append((directory, error))
    raise _none_sound(passed_over)


class CheckpointLoader:
    """Transfer of a checkpoint's rows to this rank: planned when constructed, then verified, then filled in.

    Weights are also read from a dtype that the model's holds exactly; the state of an optimizer is not.

    Args:
        shards: where to load to.
        directory: of the checkpoint.
        verify: `full` compares checksums, `sizes` only sizes and headers.
        prefixes: beginnings of the names of tensors to load.
        without: beginnings of names among these that are left as they are, there and here.
    """

    def __init__(self, shards: Iterable[StateShard], directory: Path, verify: str,
                 prefixes: tuple[str, ...] = ("",), without: tuple[str, ...] = ()) -> None:
        self.directory, self.check = directory, verify == "full"
        self.manifest = read_manifest(directory)
        self.prefixes, self.without = prefixes, without
        _as_damage(directory, lambda: check_files(directory, self.manifest))
        self.wanted = self._plan([shard for shard in shards if not shard.name.startswith(without)])

    def verify(self) -> None:
        """Compare everything that will be read with its checksums, and headers of files with the manifest."""
        if not self.check:
            return
        with ExitStack() as stack:
            files = self._open(stack)
            parts = self.manifest.parts()
            for name, payload in files.items():
                payload.check_keys(parts[name], self.manifest.values["step"])
            for shard, entry, plan in self.wanted:
                for read in plan:
                    for _ in self._blocks(files, shard, entry, read):
                        pass

    @torch.no_grad()
    def fill(self) -> None:
        """Read the rows into the shards."""
        with ExitStack() as stack:
            files = self._open(stack)
            for shard, entry, plan in self.wanted:
                for read in plan:
                    content = bytearray().join(self._blocks(files, shard, entry, read))
                    rows = torch.frombuffer(content, dtype=DTYPES[entry.dtype])
                    target = shard.rows[read.target:read.target + read.rows] if entry.shape else shard.rows
                    target.copy_(to_device(rows.view(target.shape), target.device))

    def unclaimed(self, mesh: Mesh) -> list[str]:
        """Tensors of the checkpoint that no rank has a place for. Collective."""
        names = [name for name in self.manifest.names()
                 if name.startswith(self.prefixes) and not name.startswith((*OPTIONAL, *self.without))]
        own = {shard.name for shard, _, _ in self.wanted}
        counts = torch.tensor([name in own for name in names], dtype=torch.int32, device=mesh.device)
        return [name for name, count in zip(names, sum_over(mesh["batch"], counts).tolist()) if not count]

    def _plan(self, shards: list[StateShard]) -> list[tuple[StateShard, TensorEntry, list[Read]]]:
        """Match shards with their entries and reads, in the order of the files.

        Raises CheckpointError, which names the tensors that do not fit.
        """
        wanted, differ = [], []
        for shard in shards:
            entry = self.manifest.entry(shard.name)
            if shard.name.startswith(OPTIONAL) and (entry is None or entry.shape != tuple(shard.shape)):
                continue
            if entry is None:
                differ.append(f"{shard.name} is not in the checkpoint")
            elif entry.shape != tuple(shard.shape) or not self._readable(entry, shard):
                differ.append(f"{shard.name} is {entry.dtype} {list(entry.shape)} in the checkpoint, "
                              f"{DTYPE_NAMES.get(shard.rows.dtype)} {list(shard.shape)} here")
            elif shard.rows.numel():
                rows = len(shard.rows) if shard.shape else 1
                wanted.append((shard, entry, plan_reads(shard.name, entry, shard.begin, rows)))
        if differ:
            if not any(name.startswith("optim.") for name in self.manifest.names()):
                raise weights_alone(self.directory)
            raise other_model(self.directory, differ)
        return sorted(wanted, key=lambda want: (want[2][0].chunk.file, want[2][0].chunk.begin))

    def _readable(self, entry: TensorEntry, shard: StateShard) -> bool:
        dtype = DTYPE_NAMES.get(shard.rows.dtype, "")
        return entry.dtype == dtype or self.prefixes == WEIGHTS and readable_as(entry.dtype, dtype)

    def _open(self, stack: ExitStack) -> dict[str, Payload]:
        names = {read.chunk.file for _, _, plan in self.wanted for read in plan}
        return {name: stack.enter_context(Payload(self.directory / name, self.manifest.files[name]))
                for name in sorted(names)}

    def _blocks(self, files: dict[str, Payload], shard: StateShard, entry: TensorEntry,
                read: Read) -> Iterable[memoryview]:
        width, chunk = row_bytes(entry), read.chunk
        part = ByteRange(chunk.begin, chunk.rows * width, shard.name, entry.dtype, entry.shape, chunk.crcs)
        begin = read.source * width
        return files[chunk.file].blocks(
            part, self.manifest.block, begin, begin + read.rows * width, self.check)


def weights_alone(directory: Path) -> CheckpointError:
    """Return the error of a run whose checkpoint has no optimizer to go on with."""
    return CheckpointError(
        9, "the checkpoint holds weights alone", where=str(directory),
        why="it was made of another checkpoint, and no training has saved it",
        next=f"moetrain train init.from={directory} run.name=<another name>, which begins from them")


def other_model(directory: Path, differ: list[str]) -> CheckpointError:
    """Return the error of a checkpoint of another model; `differ` are its differences, one a sentence."""
    more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
    return CheckpointError(
        3, "the checkpoint is of another model", where=str(directory), why="; ".join(differ[:3]) + more,
        next="set back model.*, optim.name, run.dtype and convert_model, or start another run with run.name")


def _load(loader: CheckpointLoader, mesh: Mesh | None) -> None:
    loader.verify()
    if mesh is not None:
        _check_all_claimed(mesh, loader)
    loader.fill()


# --- the same on every rank


def _load_newest_sound(run_dir: Path, mesh: Mesh, read: Callable[[Path], CheckpointLoader], *,
                       move_aside: bool) -> Resumed | None:
    batch, passed_over, below = mesh["batch"], [], None
    while (directory := _newest_of_all(run_dir, batch, below)) is not None:
        loader, error = _attempt(lambda: read(directory))
        if error is None:
            _, error = _attempt(loader.verify)
        if _all_succeeded(batch, error):
            _check_same_manifest(batch, loader)
            _check_all_claimed(mesh, loader)
            _, error = _attempt(loader.fill)
            if _all_succeeded(batch, error):
                return Resumed(directory, loader.manifest,
                               _report_lost(passed_over, directory, mesh, move_aside))
        passed_over.append((directory, error))
        below = step_of(directory)
    if passed_over:
        _refuse_all(passed_over, mesh)
    return None


def _newest_of_all(run_dir: Path, batch: Group, below: int | None) -> Path | None:
    """The newest checkpoint, older than step `below`, that any rank sees."""
    steps = [step_of(path) for path in checkpoints_of(run_dir)]
    step = int(largest_over(
        batch, max((step for step in steps if below is None or step < below), default=-1)))
    return None if step < 0 else run_dir / "checkpoints" / f"step-{step:08d}"


def _attempt(
    action: Callable[[], CheckpointLoader | None],
) -> tuple[CheckpointLoader | None, CheckpointError | None]:
    try:
        return action(), None
    except CheckpointError as error:
        return None, error


def _all_succeeded(batch: Group, error: CheckpointError | None) -> bool:
    """Whether no rank has an error; False where one found damage. Any other error ends all ranks."""
    worst = largest_over(batch, 0 if error is None else 1 if is_damage(error) else 2)
    if worst == 2:
        fail_together(batch, error if error is not None and not is_damage(error) else None)
    return worst == 0


def _check_same_manifest(batch: Group, loader: CheckpointLoader) -> None:
    """Require one manifest on all ranks: with separate disks they would continue from different states."""
    crc = zlib.crc32(loader.manifest.encode())
    largest, smallest = largest_over(batch, crc), -largest_over(batch, -crc)
    if largest != smallest:
        raise CheckpointError(6, "ranks see different checkpoints", where=str(loader.directory),
                              why="their manifests differ",
                              next="put run.dir where every rank sees the same files")


def _check_all_claimed(mesh: Mesh, loader: CheckpointLoader) -> None:
    left = loader.unclaimed(mesh)  # the same on all ranks, so all raise or none
    if left:
        raise other_model(loader.directory, [f"{name} is in the checkpoint alone" for name in left])


def _report_lost(passed_over: list[tuple[Path, CheckpointError | None]], loaded: Path, mesh: Mesh,
                 move_aside: bool) -> int:
    """Log on rank 0 what was lost, and set damaged checkpoints aside; returns the number of lost steps."""
    if not passed_over:
        return 0
    lost = step_of(passed_over[0][0]) - step_of(loaded)

    def report() -> None:
        for path, error in passed_over:
            error = error or next(problems(path), None)  # another rank found it: read all of the checkpoint
            what = f"{error.where}: {error.why}" if error else f"{path}: another rank cannot read it"
            log.warning("%s is damaged (%s)", path.name, what)
            if move_aside:
                try:
                    set_aside(path)
                except OSError as failure:
                    log.warning("%s could not be moved aside: %s", path, failure)
        log.warning("going on from %s: %d steps are lost", loaded.name, lost)

    on_first(mesh["batch"], report)
    return lost


def _refuse_all(passed_over: list[tuple[Path, CheckpointError | None]], mesh: Mesh) -> None:
    def refuse() -> None:
        raise _none_sound([(path, error or next(problems(path), None)) for path, error in passed_over])

    all_or_none(mesh["batch"], refuse)


def _none_sound(passed_over: list[tuple[Path, CheckpointError | None]]) -> CheckpointError:
    return CheckpointError(
        4, "no checkpoint of the run can be loaded", where=str(passed_over[0][0].parent),
        why=("; ".join(f"{error.where}: {error.why}" for _, error in passed_over if error)
             or "another rank cannot read them"),
        next="restore the files, or start another run with run.name")


def _as_damage(directory: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise damaged(directory / NAME, f"the directory cannot be read: {error.strerror or error}") from error


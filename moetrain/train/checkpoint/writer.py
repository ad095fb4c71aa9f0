"""Saving: every rank writes the tensors it owns, rank 0 writes the manifest and commits by a rename.

    checkpoints/step-00000100.tmp/rank-0000.safetensors, index-0000.json, …    all ranks, fsync
    checkpoints/step-00000100.tmp/manifest.json                                rank 0, fsync
    checkpoints/step-00000100/                                                 rename, fsync of the parent

Dense tensors belong to rank 0; an expert's to its home on the first replica. Names are global (one per layer, expert and
matrix), so a checkpoint says nothing of the mesh that wrote it. A failed write on any rank fails the save on all.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import all_or_none
from moetrain.errors import DiskError
from moetrain.train.checkpoint.manifest import NAME, Entry, Manifest
from moetrain.train.state import TrainState


def step_directory(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save(state: TrainState, run_dir: Path, mesh: Mesh, facts: dict[str, object]) -> Path:
    """Write the checkpoint of this step; collective, waits. Returns its directory. One already there stays as it is."""
    final = step_directory(run_dir, state.step)
    temporary = final.with_suffix(".tmp")
    if final.exists():
        return final
    on_all(mesh, lambda: _fresh(temporary) if mesh.is_main else None, _unwritten(temporary))
    on_all(mesh, lambda: _write_rank(state, temporary, mesh), _unwritten(temporary))
    on_all(mesh, lambda: _commit(state, temporary, final, mesh, facts) if mesh.is_main else None, _unwritten(final))
    return final


def on_all(mesh: Mesh, write: Callable[[], None], failed: Callable[[str], DiskError]) -> None:
    """Run `write` on every rank; an OSError becomes the DiskError that `failed` makes of its reason, and ends all ranks."""

    def written() -> None:
        try:
            write()
        except OSError as error:
            raise failed(str(error.strerror or error)) from error

    all_or_none(mesh["batch"], written)


def _unwritten(path: Path) -> Callable[[str], DiskError]:
    return lambda why: DiskError(2, "the checkpoint could not be written", where=str(path), why=why,
                                 next="free space or make the directory writable, then run the same command again")


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)         # what an interrupted save left behind
    directory.mkdir(parents=True)


def _write_rank(state: TrainState, directory: Path, mesh: Mesh) -> None:
    mine = {name: tensor for name, tensor in state.tensors() if _owned(name, mesh)}
    if not mine:
        return
    payload = directory / f"rank-{mesh.rank:04d}.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in mine.items()}, payload)
    _sync(payload)
    index = {name: entry._asdict() for name, entry in _index(payload).items()}
    (directory / f"index-{mesh.rank:04d}.json").write_text(json.dumps(index))


def _owned(name: str, mesh: Mesh) -> bool:
    return mesh["expert_grad"].position == 0 if ".experts." in name else mesh.is_main


def _index(payload: Path) -> dict[str, Entry]:
    """Place and checksum of every tensor of a safetensors file, from the bytes that were written."""
    with payload.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        entries = {}
        for name, item in header.items():
            begin, end = (8 + size + offset for offset in item["data_offsets"])
            file.seek(begin)
            crc = zlib.crc32(file.read(end - begin))
            entries[name] = Entry(item["dtype"], tuple(item["shape"]), payload.name, begin, end - begin, crc)
    return entries


def _commit(state: TrainState, temporary: Path, final: Path, mesh: Mesh, facts: dict[str, object]) -> None:
    manifest = Manifest(facts={**facts, "torch": torch.__version__}, values=state.values())
    for path in sorted(temporary.glob("index-*.json")):
        for name, entry in json.loads(path.read_text()).items():
            assert name not in manifest.tensors, f"{name} was written twice"
            manifest.tensors[name] = Entry(**entry)
        path.unlink()
    manifest.files = {path.name: path.stat().st_size for path in sorted(temporary.glob("*.safetensors"))}
    (temporary / NAME).write_bytes(manifest.encode())
    _sync(temporary / NAME)
    _sync(temporary)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

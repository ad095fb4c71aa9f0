"""Records of a folder of another program: its tensors, their chunks, and where those lie."""

from pathlib import Path
from typing import NamedTuple

from moetrain.checkpoint.manifest import NAME
from moetrain.checkpoint.records import ITEM_BYTES
from moetrain.errors import CheckpointError

METADATA = ".metadata"  # of torch DCP
# Bytes of an element by the name of its dtype in safetensors, which all formats of this package are read
# into.
ELEMENT_BYTES = {**ITEM_BYTES, "U16": 2, "U32": 4, "U64": 8, "C64": 8, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
                 "F8_E8M0": 1}
# torch's name of a dtype, as pickles hold it, to that of safetensors.
TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64"}


class StoredChunk(NamedTuple):
    """A block of a tensor: its place in the tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class StoredTensor(NamedTuple):
    """A tensor: dtype as safetensors names it, shape, and its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def is_stored(directory: Path) -> bool:
    """Whether a folder looks like one of another program: `.metadata`, or safetensors without manifest."""
    return (directory / METADATA).is_file() or (
        not (directory / NAME).exists() and any(directory.glob("*.safetensors")))


def damaged(path: Path, why: str, next: str = "restore it, or save it again") -> CheckpointError:
    """Error of a file that is missing, damaged, or holds what this release does not read."""
    return CheckpointError(32, "a file of a checkpoint folder is damaged", where=str(path), why=why,
                           next=next)


def outside(path: Path, file: str) -> CheckpointError:
    """Error of a folder that names a file which does not lie in it."""
    return CheckpointError(33, "a checkpoint folder points outside itself", where=str(path),
                           why=f"it says that tensors lie in {file[:200]}", next="do not trust this folder")


def not_whole(directory: Path, name: str, why: str) -> CheckpointError:
    """Error of a tensor of which parts are missing, or there twice."""
    return CheckpointError(
        34, f"{name} is not whole", where=str(directory), why=why,
        next="copy the folder again with the files of all ranks; if it was written so, the program that "
             "wrote it lost these values")

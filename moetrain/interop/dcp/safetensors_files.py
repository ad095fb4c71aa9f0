"""Headers of a folder of safetensors files: which tensors it holds, in which chunks, and where each lies.

Hugging Face's folders hold each tensor once, and `model.safetensors.index.json` says in which file. torch's
storage for Hugging Face (`torch.distributed.checkpoint.hf_storage`) writes such a folder, too, or, without
consolidation, one file a rank that holds chunks of tensors:

    __metadata__   {"DCP_SHARDING_INFO": JSON of {tensor: {"saved_offsets": [...]}}, ...}

A tensor is then as large as its chunks reach: a last chunk that is missing cannot be seen from the files
alone. This file reads no content of tensors.
"""

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import Any

from moetrain.files import SMALL, open_regular, parse_json, read_json, reason
from moetrain.interop.dcp.records import ELEMENT_BYTES, StoredChunk, StoredTensor, damaged, not_whole, outside

INDEX = "model.safetensors.index.json"
MOST_HEADER = 100 << 20  # bytes, the limit of the format itself
_MOST_INDEX = 64 * SMALL


def read_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of all safetensors files of a folder.

    Returns:
        Tensors by name. CheckpointError where a header is damaged, or files and index contradict each other.
    """
    found: dict[str, list[tuple[str, StoredChunk]]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            chunks = _header(path)
        except (OSError, ValueError, TypeError, KeyError, struct.error) as error:
            why = reason(error) if isinstance(error, OSError) else f"it is no safetensors header: {error}"
            raise damaged(path, why) from error
        for name, (dtype, chunk) in chunks.items():
            found.setdefault(name, []).append((dtype, chunk))
    _check_index(directory, {name: {chunk.file for _, chunk in chunks} for name, chunks in found.items()})
    return {name: _tensor(directory, name, chunks) for name, chunks in found.items()}


def _header(path: Path) -> dict[str, tuple[str, StoredChunk]]:
    """Dtype and place of every tensor of a file, or of the chunk of it that the file holds."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length, = struct.unpack("<Q", file.read(8))
        if length > min(MOST_HEADER, size - 8):
            raise ValueError(f"it is said to have {length} bytes, in a file of {size}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    metadata = header.pop("__metadata__", {})
    sharding = parse_json(metadata["DCP_SHARDING_INFO"]) if "DCP_SHARDING_INFO" in metadata else {}
    chunks = {}
    for name, entry in header.items():
        dtype, sizes = entry["dtype"], _numbers(entry["shape"])
        begin, end = _numbers(entry["data_offsets"])
        offsets = _numbers(sharding[name]["saved_offsets"]) if name in sharding else (0,) * len(sizes)
        if dtype not in ELEMENT_BYTES:
            raise ValueError(f"{name} has the dtype {str(dtype)[:50]}, which is not read here")
        if end - begin != prod(sizes) * ELEMENT_BYTES[dtype] or len(offsets) != len(sizes):
            raise ValueError(f"{name}: {end - begin} bytes are not {dtype} {list(sizes)}")
        if 8 + length + end > size:
            raise ValueError(f"{name} ends at byte {8 + length + end}, the file at {size}: it is truncated")
        chunks[name] = dtype, StoredChunk(offsets, sizes, path.name, 8 + length + begin, end - begin)
    return chunks


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 64 or not all(
            type(number) is int and 0 <= number < 1 << 62 for number in value):
        raise ValueError(f"{json.dumps(value)[:100]} is no list of sizes")
    return tuple(value)


def _tensor(directory: Path, name: str, found: list[tuple[str, StoredChunk]]) -> StoredTensor:
    """Put the chunks of a tensor together; its shape is as far as they reach."""
    dtypes, ranks = {dtype for dtype, _ in found}, {len(chunk.sizes) for _, chunk in found}
    if len(dtypes) > 1 or len(ranks) > 1:
        files = ", ".join(sorted(chunk.file for _, chunk in found))
        raise not_whole(directory, name, f"{files} hold different tensors of this name")
    ends = [[offset + size for offset, size in zip(chunk.offsets, chunk.sizes)] for _, chunk in found]
    shape = tuple(map(max, zip(*ends)))
    return StoredTensor(dtypes.pop(), shape, tuple(chunk for _, chunk in found if 0 not in chunk.sizes))


def _check_index(directory: Path, files: dict[str, set[str]]) -> None:
    """Compare the index, where the folder has one, with what the files hold."""
    path = directory / INDEX
    if not path.exists():
        return
    try:
        index = read_json(path, limit=_MOST_INDEX)["weight_map"]
        wanted = {str(name): str(file) for name, file in index.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, f"it is no index: {reason(error)}") from error
    for name, file in wanted.items():
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise outside(path, file)
        if files.get(name) != {file}:
            there = ", ".join(sorted(files.get(name, ()))) or "in no file"
            raise damaged(path, f"it says that {name} lies in {file}; it lies {there}",
                          "copy the folder again with all of its files")
    for name in sorted(files.keys() - wanted.keys()):
        raise damaged(path, f"{name} is not in it, and {', '.join(sorted(files[name]))} holds it",
                      "remove files that do not belong to the folder")

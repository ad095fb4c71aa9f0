"""`.metadata` of a torch DCP folder: which tensors it holds, in which chunks, and where each lies.

DCP is torch.distributed.checkpoint. Its file is a pickle of

    Metadata(state_dict_metadata: {name: TensorStorageMetadata | BytesStorageMetadata},
             planner_data, storage_data: {MetadataIndex: _StorageInfo}, storage_meta, version)
    TensorStorageMetadata(properties: TensorProperties, size, chunks: [ChunkStorageMetadata(offsets, sizes)])
    MetadataIndex(fqn, offset, index)
    _StorageInfo(relative_path, offset, length, transform_descriptors)

What releases of torch do differently, 2.2 to 2.13:

    2.2       TensorProperties and its enum of memory formats lie in torch.distributed._shard.sharded_tensor
    2.3       they lie in torch.distributed.checkpoint.metadata; Metadata has storage_meta (StorageMeta)
    later     StorageMeta has modules, _StorageInfo has transform_descriptors, Metadata has a version

Python pickles an enum by value, or, in 3.11.0 to 3.11.3, as getattr of its class. Megatron-Core adds fields
of its own to Metadata; those of plain values are passed over. This file reads the pickle without running it
(pickles.py), and imports no torch.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

from moetrain.interop.dcp.pickles import DICTS, Fields, Items, Name, PickleError, Record, read_pickle
from moetrain.interop.dcp.records import TORCH_DTYPES, StoredChunk, StoredTensor

_PACKAGE = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
METADATA, INDEX = f"{_PACKAGE}.metadata.Metadata", f"{_PACKAGE}.metadata.MetadataIndex"
TENSOR, BYTES = f"{_PACKAGE}.metadata.TensorStorageMetadata", f"{_PACKAGE}.metadata.BytesStorageMetadata"
CHUNK, PLACE = f"{_PACKAGE}.metadata.ChunkStorageMetadata", f"{_PACKAGE}.filesystem._StorageInfo"
PROPERTIES = {f"{_PACKAGE}.metadata.TensorProperties", f"{_SHARDED}.TensorProperties"}
SIZE = "torch.Size"
_DTYPES = {f"torch.{name}": dtype for name, dtype in TORCH_DTYPES.items()}
KNOWN = frozenset({
    METADATA, INDEX, TENSOR, BYTES, CHUNK, PLACE, SIZE, *PROPERTIES, *_DTYPES,
    f"{_PACKAGE}.metadata.StorageMeta", f"{_PACKAGE}.metadata._MEM_FORMAT_ENCODING",
    f"{_PACKAGE}.filesystem._StoragePrefix", f"{_SHARDED}.MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout", "builtins.getattr", *DICTS,
    *(f"builtins.{kind}" for kind in ("dict", "list", "set", "int", "float", "str")),
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath"})
MOST = 1 << 62  # limit of sizes, offsets and bytes


def read_metadata(content: bytes) -> tuple[dict[str, StoredTensor], dict[str, StoredChunk]]:
    """Read the content of `.metadata`.

    Returns:
        Tensors by name, and the places of what is no tensor by name. PickleError where it is something else.
    """
    root = _state(read_pickle(content, KNOWN, key=_index_key), METADATA)
    entries, places = root.get("state_dict_metadata"), root.get("storage_data")
    if not isinstance(entries, Fields) or not isinstance(places, Fields):
        raise PickleError("Metadata has no table of tensors, or none of their places")
    tensors: dict[str, StoredTensor] = {}
    others: dict[str, StoredChunk] = {}
    # Tensors may share a list of chunks in the pickle. Each chunk has more than ten opcodes of its own, so
    # that a folder that shares none stays far below this bound.
    left = len(content)
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise PickleError("the name of a tensor is no text")
        if isinstance(entry, Record) and entry.name == BYTES:
            if index_key(name, None) in places:
                others[name] = _place(places[index_key(name, None)], (), ())
            continue
        state = _state(entry, TENSOR)
        chunks = state.get("chunks")
        left -= len(chunks) if isinstance(chunks, Items) else 0
        if not isinstance(chunks, Items) or left < 0:
            raise PickleError(f"{name} has no list of chunks" if left >= 0 else "tensors share their chunks")
        shape = _sizes(state.get("size"))
        tensors[name] = StoredTensor(_dtype(name, state), shape, tuple(_chunks(name, shape, chunks, places)))
    return tensors, others


def index_key(name: str, offset: tuple[int, ...] | None) -> str:
    """Text that stands for a MetadataIndex as the key of a dict; its `index` is a hint and does not count."""
    return name if offset is None else f"{name}\0{','.join(map(str, offset))}"


def _index_key(record: Record) -> str:
    state = _state(record, INDEX)
    offset = state.get("offset")
    if not isinstance(state.get("fqn"), str):
        raise PickleError("a MetadataIndex has no name")
    return index_key(state["fqn"], None if offset is None else _sizes(offset))


def _chunks(name: str, shape: tuple[int, ...], chunks: Items, places: Fields) -> Iterator[StoredChunk]:
    """Yield the chunks of a tensor that hold elements, each with its place."""
    for chunk in chunks:
        state = _state(chunk, CHUNK)
        offsets, sizes = _sizes(state.get("offsets")), _sizes(state.get("sizes"))
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= full for offset, size, full in zip(offsets, sizes, shape))
        if not inside:
            raise PickleError(f"{name}: the chunk at {list(offsets)} of sizes {list(sizes)} does not lie in "
                              f"its shape {list(shape)}")
        if 0 in sizes:
            continue
        place = places.get(index_key(name, offsets))
        if place is None:
            raise PickleError(f"{name}: nothing says where its chunk at {list(offsets)} of sizes "
                              f"{list(sizes)} lies")
        yield _place(place, offsets, sizes)


def _place(record: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> StoredChunk:
    state = _state(record, PLACE)
    file, begin, length = state.get("relative_path"), state.get("offset"), state.get("length")
    if not isinstance(file, str) or not _is_size(begin) or not _is_size(length):
        raise PickleError("a _StorageInfo has no file, offset and length")
    transforms = state.get("transform_descriptors")
    if transforms:
        named = ", ".join(map(str, transforms)) if isinstance(transforms, Items) else "something"
        raise PickleError(f"{file} was written through {named[:100]}, which is not read here")
    return StoredChunk(offsets, sizes, file, begin, length)


def _dtype(name: str, state: Fields) -> str:
    """Dtype of a tensor, from its TensorProperties, whose state is (dtype, layout, ...), or a dict."""
    properties = state.get("properties")
    if not isinstance(properties, Record) or properties.name not in PROPERTIES:
        raise PickleError(f"{name} has no properties")
    fields = properties.state
    dtype, layout = ((fields.get("dtype"), fields.get("layout")) if isinstance(fields, Fields) else
                     fields[:2] if isinstance(fields, tuple) and len(fields) >= 2 else (None, None))
    if not isinstance(dtype, Name) or dtype.text not in _DTYPES:
        raise PickleError(f"{name} has no dtype that is read here")
    if isinstance(layout, Record) and layout.arguments != ("torch.strided",):
        raise PickleError(f"{name} is not strided: its layout is {str(layout.arguments)[:50]}")
    return _DTYPES[dtype.text]


def _state(record: Any, name: str) -> Fields:
    """Fields of a record of the class `name`."""
    if not isinstance(record, Record) or record.name != name or not isinstance(record.state, Fields):
        found = record.name if isinstance(record, Record) else type(record).__name__
        raise PickleError(f"it holds {found} where {name} belongs")
    return record.state


def _sizes(value: Any) -> tuple[int, ...]:
    """Numbers of a torch.Size, or of a tuple or list in its place."""
    if isinstance(value, Record) and value.name == SIZE and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, (tuple, Items)) or len(value) > 64 or not all(map(_is_size, value)):
        raise PickleError("a size or an offset is not a list of numbers")
    return tuple(value)


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST

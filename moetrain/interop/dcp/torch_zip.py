"""One tensor in the format of torch.save: a zip without compression, whose pickle is read and never run.

    archive/data.pkl      a call of torch._utils._rebuild_tensor_v2 or _v3: storage, offset, size, stride
    archive/data/<key>    bytes of the storage
    archive/byteorder     "little"

DCP writes each chunk of a tensor as one such archive into `__<rank>_<n>.distcp`, beginning at any byte. Only
the directory at the end of the archive and the pickle are read here; the bytes of the storage are found by
their place, so that a reader may take any part of them. This file imports no torch.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from moetrain.interop.dcp.pickles import Name, PickleError, Record, read_pickle
from moetrain.interop.dcp.records import ELEMENT_BYTES, TORCH_DTYPES

MOST_DIRECTORY = 1 << 16  # bytes of the zip's directory, and of its pickle: a tensor's take 500
_MOST = 1 << 62
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64"}.items()}
_UNTYPED = "torch.storage.UntypedStorage"
KNOWN = frozenset({*_REBUILD, *_STORAGES, _UNTYPED, "collections.OrderedDict",
                   *(f"torch.{name}" for name in TORCH_DTYPES)})

_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY, _LOCAL = b"PK\1\2", b"PK\3\4"


class ZippedTensor(NamedTuple):
    """A tensor in an archive: its view of a storage, and where that lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    begin: int                # of the tensor's first element, in bytes of the file
    storage: tuple[int, int]  # first byte of the whole storage in the file, and its length
    crc: int                  # CRC-32 of the whole storage


class _Entry(NamedTuple):
    header: int  # place of its local header
    length: int
    crc: int


def read_zipped_tensor(read: Callable[[int, int], bytes], begin: int, length: int) -> ZippedTensor:
    """Find a tensor in an archive; PickleError where it is none, or damaged.

    Args:
        read: returns bytes (first, count) of the file.
        begin: first byte of the archive in the file.
        length: its bytes.
    """
    entries = _directory(read, begin, length)

    def content(name: str) -> tuple[int, _Entry]:
        entry = entries.get(name)
        if entry is None:
            raise PickleError(f"its archive holds no {name}")
        header = read(begin + entry.header, 30)
        first = entry.header + 30 + sum(struct.unpack_from("<HH", header, 26))
        if header[:4] != _LOCAL or first + entry.length > length:
            raise PickleError(f"{name} does not lie in its archive")
        return begin + first, entry

    first, order = content("byteorder") if "byteorder" in entries else (0, _Entry(0, 0, 0))
    if order.length and read(first, min(order.length, 16)) != b"little":
        raise PickleError("its bytes are not in little-endian order")
    first, entry = content("data.pkl")
    if entry.length > MOST_DIRECTORY:
        raise PickleError(f"the pickle of one tensor has {entry.length:,} bytes")
    dtype, key, shape, strides, offset, count = _view(read_pickle(read(first, entry.length), KNOWN))
    first, entry = content(f"data/{key}")
    size = ELEMENT_BYTES[dtype]
    last = offset + sum((full - 1) * stride for full, stride in zip(shape, strides))
    if entry.length != count or 0 not in shape and (last + 1) * size > count:
        raise PickleError(f"it reads elements up to {last} of a storage of {entry.length} bytes")
    return ZippedTensor(dtype, shape, strides, first + offset * size, (first, entry.length), entry.crc)


def _directory(read: Callable[[int, int], bytes], begin: int, length: int) -> dict[str, _Entry]:
    """Entries of an archive, by their names below its own folder."""
    if length < 22:
        raise PickleError("it is too short for an archive of torch.save")
    end = read(begin + length - 22, 22)
    if end[:4] != _END:
        raise PickleError("it is no archive of torch.save, or truncated")
    size, place = struct.unpack_from("<II", end, 12)
    if 0xFFFFFFFF in (size, place):
        size, place = _directory64(read, begin, length)
    if size > MOST_DIRECTORY or place + size > length:
        raise PickleError(f"its directory of {size} bytes at byte {place} does not lie in it")
    content, found, at = read(begin + place, size), {}, 0
    while at + 46 <= size and content[at:at + 4] == _ENTRY:
        flags, method = struct.unpack_from("<HH", content, at + 8)
        crc, packed, full, named, extra, comment = struct.unpack_from("<IIIHHH", content, at + 16)
        header, = struct.unpack_from("<I", content, at + 42)
        name = content[at + 46:at + 46 + named].decode("utf-8", "replace")
        more = content[at + 46 + named:at + 46 + named + extra]
        full, packed, header = _wide(full, packed, header, more)
        if method != 0 or flags & 1 or packed != full:
            raise PickleError(f"{name[:100]} is compressed or encrypted, as torch.save never does")
        inner = name.partition("/")[2]
        if inner in found:
            raise PickleError(f"its archive holds {name[:100]} twice")
        if header + 30 > length:
            raise PickleError(f"{name[:100]} does not lie in its archive")
        found[inner] = _Entry(header, full, crc)
        at += 46 + named + extra + comment
    if at != size:
        raise PickleError("its directory is damaged")
    return found


def _directory64(read: Callable[[int, int], bytes], begin: int, length: int) -> tuple[int, int]:
    """Length and place of the directory of a zip64 archive."""
    locator = read(begin + length - 42, 20) if length >= 98 else b""
    if locator[:4] != _LOCATOR64:
        raise PickleError("it is no archive of torch.save, or truncated")
    place, = struct.unpack_from("<Q", locator, 8)
    record = read(begin + place, 56) if place + 56 <= length else b""
    if record[:4] != _END64:
        raise PickleError("its directory is damaged")
    size, first = struct.unpack_from("<QQ", record, 40)
    return size, first


def _wide(full: int, packed: int, header: int, extra: bytes) -> tuple[int, int, int]:
    """Numbers of an entry; those that do not fit into 32 bits stand in the zip64 field of `extra`."""
    values, at = [full, packed, header], 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4:at + 4 + size]
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if len(wide) < 8:
                        raise PickleError("its directory is damaged")
                    values[index], = struct.unpack_from("<Q", wide)
                    wide = wide[8:]
        at += 4 + size
    return values[0], values[1], values[2]


def _view(value: Any) -> tuple[str, str, tuple[int, ...], tuple[int, ...], int, int]:
    """Dtype, key of the storage, shape, strides, offset in elements and bytes of the storage of a tensor."""
    if not isinstance(value, Record) or value.name not in _REBUILD or len(value.arguments) < 6:
        raise PickleError("its pickle does not build one tensor")
    storage, offset, shape, strides = value.arguments[:4]
    if not isinstance(storage, Record) or storage.name != "persistent" or len(storage.arguments[0]) != 5:
        raise PickleError("its tensor has no storage")
    _, kind, key, _, count = storage.arguments[0]
    sizes = (offset, count, *shape, *strides) if type(shape) is type(strides) is tuple else (None,)
    plain = all(type(size) is int and 0 <= size < _MOST for size in sizes)
    if not plain or len(shape) != len(strides) or len(shape) > 64 or type(key) is not str:
        raise PickleError("the sizes or strides of its tensor are not numbers")
    if not isinstance(kind, Name):
        raise PickleError("its storage has no type")
    if kind.text in _STORAGES:
        dtype = TORCH_DTYPES[_STORAGES[kind.text]]
        return dtype, key, shape, strides, offset, count * ELEMENT_BYTES[dtype]
    named = value.arguments[6] if len(value.arguments) > 6 else None
    if kind.text != _UNTYPED or not isinstance(named, Name) or not named.text.startswith("torch."):
        raise PickleError("its storage has no dtype")
    return TORCH_DTYPES[named.text.removeprefix("torch.")], key, shape, strides, offset, count

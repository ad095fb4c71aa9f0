"""Reading of arrays of given kinds and shapes from an untrusted .npz file.

The size that an array claims is compared with the size of its file before memory is
allocated. Nothing is unpickled.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.files import open_regular, reason

_KINDS = {"integers": "iu", "numbers": "f", "text": "U"}


class Form(NamedTuple):
    """Required kind and shape of an array."""

    kind: str              # integers, numbers or text
    axes: tuple[str, ...]  # a name for each axis; axes of one name must have one length


def read_arrays(path: Path, forms: Mapping[str, Form]) -> dict[str, np.ndarray]:
    """Read the arrays named in `forms`.

    Raises ValueError where the file cannot be read, or an array does not have its form.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            arrays = {name: _read(archive, name, form) for name, form in forms.items()}
        _same_lengths(arrays, forms)
        return arrays
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds of error for damaged files
        raise ValueError(reason(error)) from error


def _read(archive: zipfile.ZipFile, name: str, form: Form) -> np.ndarray:
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no array {name}") from None
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0,
                  (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = header(file)
        if dtype.hasobject or dtype.kind not in _KINDS[form.kind]:
            raise ValueError(f"{name} is {dtype}, not {form.kind}")
        if len(shape) != len(form.axes) or fortran_order and len(shape) > 1:
            raise ValueError(f"{name} has the shape {list(shape)}, not {list(form.axes)}")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size != member.file_size - file.tell():
            raise ValueError(f"{name} of shape {list(shape)} would have {size:,} bytes, "
                             f"{member.file_size - file.tell():,} are there")
        content = file.read()
    if len(content) != size:
        raise ValueError(f"{name} ends early")
    return np.frombuffer(content, dtype).reshape(shape)


def _same_lengths(arrays: Mapping[str, np.ndarray], forms: Mapping[str, Form]) -> None:
    lengths: dict[str, int] = {}
    for name, form in forms.items():
        for axis, length in zip(form.axes, arrays[name].shape):
            if lengths.setdefault(axis, length) != length:
                raise ValueError(f"{name} has {length} {axis}, another array {lengths[axis]}")

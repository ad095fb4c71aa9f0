"""Read the arrays of an .npz file that anybody may have written: each of the kind and shape that is asked for, or a ValueError.

The size that an array claims is compared with what the file holds before memory is asked for. Nothing is unpickled.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.files import open_regular, reason

_KINDS = {"integers": "iu", "text": "U"}


class Form(NamedTuple):
    """What an array has to be. kind: integers or text; axes: a name for each, equal names being equal lengths."""

    kind: str
    axes: tuple[str, ...]


def read_arrays(path: Path, forms: Mapping[str, Form]) -> dict[str, np.ndarray]:
    """The arrays named in `forms`; ValueError says why where the file cannot be read, or one is not what its form says."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            arrays = {name: _read(archive, name, form) for name, form in forms.items()}
        _same_lengths(arrays, forms)
        return arrays
    except Exception as error:      # zipfile, zlib and numpy raise a dozen kinds for what they cannot read
        raise ValueError(reason(error)) from error


def _read(archive: zipfile.ZipFile, name: str, form: Form) -> np.ndarray:
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no array {name}") from None
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = header(file)
        if dtype.hasobject or dtype.kind not in _KINDS[form.kind]:
            raise ValueError(f"{name} is {dtype}, not {form.kind}")
        if len(shape) != len(form.axes) or fortran_order and len(shape) > 1:
            raise ValueError(f"{name} has the shape {list(shape)}, not {list(form.axes)}")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size != member.file_size - file.tell():
            raise ValueError(f"{name} of shape {list(shape)} would have {size:,} bytes, {member.file_size - file.tell():,} are there")
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

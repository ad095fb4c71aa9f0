"""Comparison of the tensors that a model has with those that are stored, by name, dtype and shape.

What differs is worded one line a tensor; the same matrix of several experts of a layer is one line.
"""

from collections.abc import Mapping
from typing import NamedTuple

from moetrain.checkpoint.records import Manifest, split_expert

# dtype -> dtypes that hold its values exactly.
_WIDER = {"F32": ("F64",), "BF16": ("F32", "F64"), "F16": ("F32", "F64")}


class TensorKind(NamedTuple):
    """Dtype, by its name in a manifest, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def stored_tensors(manifest: Manifest, prefixes: tuple[str, ...]) -> dict[str, TensorKind]:
    """List the tensors of a checkpoint whose names begin so."""
    entries = ((name, manifest.entry(name)) for name in manifest.names() if name.startswith(prefixes))
    return {name: TensorKind(entry.dtype, entry.shape) for name, entry in entries if entry is not None}


def readable_as(found: str, expected: str) -> bool:
    """Whether values of one dtype can be read as another without loss."""
    return found == expected or expected in _WIDER.get(found, ())


def differences(expected: Mapping[str, TensorKind], found: Mapping[str, TensorKind]) -> list[str]:
    """Word every difference, in the order of `expected`; then what it has no place for."""
    experts: dict[tuple[str, str], list[int]] = {}
    for name in [*expected, *(name for name in found if name not in expected)]:
        wanted, there = expected.get(name), found.get(name)
        if wanted and there and wanted.shape == there.shape and readable_as(there.dtype, wanted.dtype):
            continue
        text = f"expected {wanted or 'no such tensor'}, found {there or 'none'}"
        pattern, expert = split_expert(name) or (name, -1)
        experts.setdefault((pattern, text), []).append(expert)
    return [f"{pattern if len(ids) > 1 else pattern.replace('*', str(ids[0]))}: {text}"
            + (f" ({len(ids)} experts)" if len(ids) > 1 else "") for (pattern, text), ids in experts.items()]

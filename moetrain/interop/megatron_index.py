"""Reading of a Megatron-Core indexed dataset: its .idx by Megatron's own reader, its .bin block by block."""

import os
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.data.tokens.index import Ending, Report, TokenIndex, read_once
from moetrain.errors import DataError
from moetrain.files import open_regular, reason

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")   # magic, version, type of tokens, sequences, bounds of documents
_MAX_SAMPLED = 10_000             # documents whose last ids are compared


class _Index(NamedTuple):
    """Content of a dataset's .idx."""

    dtype: np.dtype     # of the tokens
    starts: np.ndarray  # int64 [documents + 1], first token of each document, and the end


def read_dataset(prefix: Path, vocab_size: int, report: Report) -> TokenIndex:
    """Read a dataset whole and index it; DataError where its files contradict each other.

    Args:
        prefix: path of the two files, without .bin and .idx.
        vocab_size: number of token ids.
        report: called as blocks are read.
    """
    index, file = _read_index(prefix), Path(f"{prefix}.bin")
    tokens, width = int(index.starts[-1]), index.dtype.itemsize
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size != tokens * width:
            raise _wrong_length(prefix, f"{size:,} bytes instead of {tokens * width:,}")
        last, share = _last_id(opened.fileno(), index)
        count = _Counter(last)
        checksums = read_once(opened, file, start=0, tokens=tokens, dtype=index.dtype, vocab_size=vocab_size,
                              visit=count.look, report=report)
    documents = len(index.starts) - 1
    ending = Ending(last, share, max(0, count.found - round(share * documents)))
    return TokenIndex("Megatron indexed", 0, index.dtype, checksums, index.starts, ending)


class _Counter:
    """Counter of one token id."""

    def __init__(self, id: int) -> None:
        self._id, self.found = id, 0

    def look(self, begin: int, block: np.ndarray) -> None:
        self.found += int(np.count_nonzero(block == self._id))


def _last_id(descriptor: int, index: _Index) -> tuple[int, float]:
    """The most frequent last token of documents, and the share of documents that end in it.

    At most _MOST_LOOKED_AT documents are sampled, evenly spaced.
    """
    full = np.flatnonzero(np.diff(index.starts)) + 1
    positions = index.starts[full[::-(-len(full) // _MAX_SAMPLED)]] - 1
    width = index.dtype.itemsize
    ids = np.frombuffer(
        b"".join(os.pread(descriptor, width, int(position) * width) for position in positions), index.dtype)
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts.argmax()]), float(counts.max() / len(positions))


def _read_index(prefix: Path) -> _Index:
    dataset = _dataset(prefix)
    lengths = np.asarray(dataset.index.sequence_lengths, np.int64)
    documents = np.asarray(dataset.index.document_indices, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    dtype = np.dtype(dataset.index.dtype)
    if dtype.kind not in "iu":
        raise _damaged(prefix, f"its tokens are {dtype}, not integers")
    if ((lengths < 0).any()
            or (np.asarray(dataset.index.sequence_pointers) != starts[:-1] * dtype.itemsize).any()):
        raise _damaged(prefix, "its sequences do not lie end to end")
    if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        raise _damaged(prefix, "its documents do not cover the sequences")
    return _Index(dtype, starts[documents])


def _dataset(prefix: Path) -> Any:
    _check_header(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns about missing packages of other accelerators
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    try:
        return IndexedDataset(str(prefix), multimodal=False, mmap=True)
    except (AssertionError, ValueError, OSError) as error:
        raise _damaged(
            prefix, f"Megatron's reader refuses it: {type(error).__name__} {error}".rstrip()) from error


def _check_header(prefix: Path) -> None:
    """Compare the counts in the header with the sizes of the files, before Megatron maps them.

    When Megatron's reader fails half-way, its object stays behind, and its
    finalizer raises at any later time.
    """
    index = Path(f"{prefix}.idx")
    try:
        with open_regular(index) as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise _damaged(prefix, reason(error)) from error
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise _damaged(prefix, f"it starts with {head[:9]!r}, not with {_MAGIC!r} and a header")
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code not in range(1, 9) or not documents:
        raise _damaged(prefix, f"version {version}, type of tokens {code}, {documents} bounds of documents")
    size, expected = index.stat().st_size, _HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        kind = "; a multimodal dataset has that length" if size == expected + sequences else ""
        raise _damaged(prefix, f"{size:,} bytes instead of {expected:,} for {sequences:,} sequences{kind}")
    if not Path(f"{prefix}.bin").stat().st_size:
        raise _wrong_length(prefix, "it is empty")


def _damaged(prefix: Path, why: str) -> DataError:
    return DataError(71, "an indexed dataset cannot be read", where=f"{prefix}.idx", why=why,
                     next="preprocess the text again, or restore the file from a copy")


def _wrong_length(prefix: Path, why: str) -> DataError:
    return DataError(72, "a dataset is not as long as its index says", where=f"{prefix}.bin", why=why,
                     next="copy both files again, or preprocess the text again")

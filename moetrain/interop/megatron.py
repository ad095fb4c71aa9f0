"""data=megatron: Megatron-Core's indexed datasets (<prefix>.bin, <prefix>.idx) as training data.

    open_indexed(path, tokenizer, vocab_size, …) -> what data.token_dataset.TokenDataset reads in place of a prepared folder

A dataset is a domain; in a folder of several, each is one, by the name of its files. data.path also takes what Megatron's
--data-path takes (`megatron_blend.py`): several prefixes, and before each the share of the samples that comes from it.
Documents lie end to end as the preprocessing wrote them: an end-of-document id is where it put one, none is added. The index
is read by Megatron's own `IndexedDataset`, the tokens by `data/token_files.py`; windows, order and sample ids are those of
data=tokens.

Held out is data.held_out, else what a folder calls `valid` beside `train`, else a share of the documents of each domain (one
in 20), chosen by a permutation keyed by the domain's content; where a domain has too few documents for that, each of them
gives up that share of its tokens, the last. Duplicates are not looked for.

What the documents end in is looked at (`data/end_token.py`): almost all of them end in the id that --append-eod wrote.
"""

import logging
import os
import struct
import warnings
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from moetrain.data.end_token import Endings, closing_id, open_tokenizer
from moetrain.data.file_names import by_name
from moetrain.data.given_splits import TEST, TRAIN, VALID, without_split
from moetrain.data.permutation import permutation
from moetrain.data.split import exact
from moetrain.data.token_files import (SHARE, Member, TokenFile, TokenFiles, open_files, read_once, refuse_leak,
                                       say_twice, token_file)
from moetrain.errors import DataError
from moetrain.files import open_regular, reason, shown
from moetrain.interop.megatron_blend import parse_blend
from moetrain.interop.packages import require

_FORMAT = "moetrain-megatron-2"
_SUFFIXES = (".bin", ".idx")
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")   # magic, version, type of tokens, sequences, bounds of documents
_MOST_LOOKED_AT = 10_000             # documents whose last ids are compared

log = logging.getLogger(__name__)


class _Named(NamedTuple):
    """A dataset to open. weight: its share of the samples; None where they come by their size."""

    domain: str
    prefix: Path
    weight: float | None


class _Index(NamedTuple):
    """What the .idx of a dataset says. starts: int64 [documents + 1], in tokens."""

    dtype: np.dtype
    starts: np.ndarray


def open_indexed(*, path: str, tokenizer: str, vocab_size: int, end_token: str | None = None,
                 held_out: str | None = None, held_out_share: float = float(SHARE), split: str = "respect",
                 weights: Mapping[str, float] | None = None) -> TokenFiles:
    """Open indexed datasets.

    Args:
        path: a prefix, several of them with or without weights, or a folder.
        tokenizer: none, bytes or the path of a tokenizer.json, which brings its own vocabulary.
        vocab_size: the vocabulary where the tokenizer is none.
        end_token: id that closes a document; None: what almost all documents end in.
        held_out: what to evaluate on, in the words of `path`, without weights.
        held_out_share: of the documents of a domain.
        split: respect a split that a folder holds, or merge it.
        weights: data.weights, which a blend with weights takes the place of.
    """
    require("megatron.core", extra="megatron", key="data=megatron")
    encoder, typed = open_tokenizer(tokenizer, end_token)
    vocabulary = encoder.vocab_size if encoder else vocab_size
    train, valid = _datasets(path, held_out, merge=split == "merge")
    shares = _shares(path, train, weights or {})
    opened = [(one.domain, *_open(one.prefix, vocabulary)) for one in train]
    evaluated = [(one.domain, *_open(one.prefix, vocabulary)) for one in valid]
    say_twice(file for _, file, _ in opened)
    refuse_leak((file for _, file, _ in opened), (file for _, file, _ in evaluated))
    end_id = closing_id([endings for _, _, endings in opened + evaluated], typed=typed, encoder=encoder)
    share = exact(held_out_share) if not valid else Fraction(0)
    domains = sorted({one.domain for one in train + valid})
    members = [*(Member(domains.index(domain), file, _trained(file, share)) for domain, file, _ in opened),
               *(Member(domains.index(domain), file, np.zeros(len(file.starts) - 1, np.int64))
                 for domain, file, _ in evaluated)]
    members.sort(key=lambda member: member.domain)
    return open_files(Path(path), _FORMAT, members, domains, vocab_size=vocabulary, tokenizer=encoder, end_id=end_id,
                      settings=[], shares=shares)


# --- which datasets there are


def _datasets(path: str, held_out: str | None, *, merge: bool) -> tuple[list[_Named], list[_Named]]:
    """(what is trained on, what is held out; empty where a share is)."""
    blend = parse_blend(path, "data.path")
    if blend.weights and any(prefix.is_dir() for prefix in blend.prefixes):
        raise DataError(164, "a blend of datasets is not understood", where=f"data.path={path}",
                        why="a weight stands before a folder, which may hold several datasets",
                        next="data.path='<weight> <prefix> <weight> <prefix>'")
    valid = [] if held_out is None else _names(_every(_valid_prefixes(held_out)), VALID)
    if len(blend.prefixes) == 1 and blend.prefixes[0].is_dir():
        train, own = _in_folder(blend.prefixes[0], merge=merge, apart=None if held_out is None else TRAIN)
    else:
        prefixes = _every(blend.prefixes)
        train, own = _names(prefixes, None if held_out is None else TRAIN), []
        train = [one._replace(weight=weight) for one, weight in zip(train, blend.weights or [None] * len(train))]
    taken = {os.path.realpath(one.prefix) for one in valid}
    train = [one for one in train if os.path.realpath(one.prefix) not in taken]
    if not train:
        raise DataError(70, "there is no indexed dataset", where=f"{path} (data.path)", why="data.held_out takes all of it",
                        next="data.path=<prefix of a .bin and .idx, without the ending, or a folder of them>")
    return train, valid or own


def _in_folder(folder: Path, *, merge: bool, apart: str | None) -> tuple[list[_Named], list[_Named]]:
    """(what is trained on, what is held out) of the datasets of a folder; what is called `test` is neither.

    Args:
        folder: of the datasets.
        merge: whether a split that is there is left out of account.
        apart: train where data.held_out is given: what is called `valid` is left alone too.
    """
    files = (prefix.relative_to(folder).with_name(f"{prefix.name}.idx") for prefix in _prefixes(folder))
    named: dict[str, list[_Named]] = {TRAIN: [], VALID: [], TEST: []}
    for one in by_name(map(PurePosixPath, files), shards=False, merge=merge, apart=apart):
        named[one.split].append(_Named(one.domain, folder / one.path.stem, None))
    alone = named[TEST] + (named[VALID] if apart else [])
    if alone:
        log.info("left alone, as a test set is: %s", shown(", ".join(one.prefix.name for one in alone)))
    return named[TRAIN], [] if apart else named[VALID]


def _valid_prefixes(held_out: str) -> list[Path]:
    blend = parse_blend(held_out, "data.held_out")
    if blend.weights is not None:
        raise DataError(164, "a blend of datasets is not understood", where=f"data.held_out={held_out}",
                        why="it has weights, and held-out data is evaluated domain by domain, each as a whole",
                        next=f"data.held_out='{' '.join(map(str, blend.prefixes))}'")
    return blend.prefixes


def _every(paths: list[Path]) -> list[Path]:
    return [prefix for path in paths for prefix in _prefixes(path)]


def _names(prefixes: list[Path], apart: str | None) -> list[_Named]:
    """Datasets by the shortest end of their path that tells them apart. apart: the split that they are of, which is left out
    of the name, so that wiki_train and wiki_valid are one domain."""
    names = [prefix.name for prefix in prefixes]
    depth = 1
    while len(set(names)) < len(names):
        if len(set(map(str, prefixes))) < len(prefixes):
            twice = next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)
            raise DataError(164, "a blend of datasets is not understood", where=str(twice),
                            why="it is named twice, and each is a domain of its own",
                            next="name it once, with the sum of the weights")
        depth += 1
        names = ["/".join(prefix.parts[-depth:]) for prefix in prefixes]
    if apart:
        names = [without_split(f"{name}.idx").removesuffix(".idx") for name in names]
    return [_Named(name, prefix, None) for name, prefix in zip(names, prefixes)]


def _shares(path: str, named: list[_Named], weights: Mapping[str, float]) -> dict[str, float] | None:
    if named[0].weight is None:
        return None
    if weights:
        raise DataError(164, "a blend of datasets is not understood", where=f"data.path={path}, data.weights",
                        why="weights are given twice: those of data.path are shares of the samples, "
                            "those of data.weights factors on them",
                        next="~data.weights, or data.path without weights")
    return {one.domain: one.weight for one in named if one.weight is not None}


def _prefixes(path: Path) -> list[Path]:
    """The datasets below a path, by name."""
    if path.is_dir():
        found = sorted({file.with_suffix("") for suffix in ("*.idx", "*.bin") for file in path.glob(suffix)})
    else:
        found = [path.with_suffix("") if path.suffix in (".idx", ".bin") else path]
    for prefix in found or [path / "<name>"]:
        for suffix in _SUFFIXES:
            file = Path(f"{prefix}{suffix}")
            if not file.is_file():
                raise DataError(70, "there is no indexed dataset", where=f"{path} (data.path)", why=f"{file} is not there",
                                next="data.path=<prefix of a .bin and .idx, without the ending, or a folder of them>")
    return found


# --- reading one


def _open(prefix: Path, vocab_size: int) -> tuple[TokenFile, Endings]:
    index, file = _read_index(prefix), Path(f"{prefix}.bin")
    tokens, width = int(index.starts[-1]), index.dtype.itemsize
    with open_regular(file) as opened:
        status = os.fstat(opened.fileno())
        if status.st_size != tokens * width:
            raise _wrong_length(prefix, f"{status.st_size:,} bytes instead of {tokens * width:,}")
        last, share = _last_id(opened.fileno(), index)
        count = _Occurrences(last)
        checksums = read_once(opened, file, start=0, tokens=tokens, dtype=index.dtype, vocab_size=vocab_size,
                              visit=count.look)
    made = token_file(file, status, start=0, tokens=tokens, dtype=index.dtype, checksums=checksums,
                      vocab_size=vocab_size, starts=index.starts)
    documents = len(index.starts) - 1
    return made, Endings(str(prefix), documents, last, share, max(0, count.found - round(share * documents)))


class _Occurrences:
    """How often an id occurs."""

    def __init__(self, id: int) -> None:
        self._id, self.found = id, 0

    def look(self, begin: int, block: np.ndarray) -> None:
        self.found += int(np.count_nonzero(block == self._id))


def _last_id(descriptor: int, index: _Index) -> tuple[int, float]:
    """The most frequent last token of documents, and the share of them that end in it; of as many as are looked at."""
    full = np.flatnonzero(np.diff(index.starts)) + 1
    places = index.starts[full[::-(-len(full) // _MOST_LOOKED_AT)]] - 1
    width = index.dtype.itemsize
    ids = np.frombuffer(b"".join(os.pread(descriptor, width, int(place) * width) for place in places), index.dtype)
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts.argmax()]), float(counts.max() / len(places))


def _read_index(prefix: Path) -> _Index:
    dataset = _dataset(prefix)
    lengths = np.asarray(dataset.index.sequence_lengths, np.int64)
    documents = np.asarray(dataset.index.document_indices, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    dtype = np.dtype(dataset.index.dtype)
    if dtype.kind not in "iu":
        raise _damaged(prefix, f"its tokens are {dtype}, not integers")
    if (lengths < 0).any() or (np.asarray(dataset.index.sequence_pointers) != starts[:-1] * dtype.itemsize).any():
        raise _damaged(prefix, "its sequences do not lie end to end")
    if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        raise _damaged(prefix, "its documents do not cover the sequences")
    return _Index(dtype, starts[documents])


def _dataset(prefix: Path) -> Any:
    _check_header(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # that other accelerators' packages are not installed
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    try:
        return IndexedDataset(str(prefix), multimodal=False, mmap=True)
    except (AssertionError, ValueError, OSError) as error:
        raise _damaged(prefix, f"Megatron's reader refuses it: {type(error).__name__} {error}".rstrip()) from error


def _check_header(prefix: Path) -> None:
    """The counts against the files, before anything is mapped: a reader that fails half-way leaves an object behind whose
    removal raises, at any later time."""
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


def _trained(file: TokenFile, share: Fraction) -> np.ndarray:
    """How many tokens of each document are trained on, its first; the rest is held out."""
    sizes = np.diff(file.starts)
    count = len(sizes)
    if count * share < 1:
        return sizes - sizes * share.numerator // share.denominator
    trained = sizes.copy()
    trained[permutation(("megatron", file.content), count)[:int(count * share)]] = 0
    return trained

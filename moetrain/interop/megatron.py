"""Megatron-Core's indexed datasets (<prefix>.bin, <prefix>.idx) as training data: data=megatron.

    open_indexed(path, tokenizer, vocab_size, …) -> TokenFiles, which data.batches.token_dataset.TokenDataset
                                                    reads in place of a prepared folder

A dataset is a domain; in a folder of several, each dataset is one, named like its files. data.path takes the
syntax of Megatron's --data-path, too (`megatron_blend.py`): several prefixes, each with the share of the
samples that comes from it. Documents lie end to end as the preprocessing wrote them, and no end-of-document
id is added. Megatron's own `IndexedDataset` reads the index (`megatron_index.py`), `data/tokens/blocks.py`
the tokens; windows, order and sample ids are those of data=tokens. Both files of a dataset are read whole
once, and an index of moetrain describes them from then on (`data/pretokenized/token_indexes.py`).

Held-out data is data.held_out. Without it, it is what a folder calls `valid` beside `train`, or else a share
of the documents of each domain (one in 20), chosen by a permutation keyed by the domain's content. Where a
domain has too few documents for that, the last tokens of each document are held out, by the same share.
Duplicates are not searched for.

`data/pretokenized/end_token.py` finds the end-of-document id: almost all documents end in
the id that --append-eod wrote.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from moetrain.data.account.ledgers import HELD, HELD_OUT, TRAINED
from moetrain.data.batches.permutation import permutation
from moetrain.data.corpus.given_splits import TEST, TRAIN, VALID, without_split
from moetrain.data.corpus.split import as_fraction
from moetrain.data.pretokenized.account import TokenAccount, split_reason
from moetrain.data.pretokenized.end_token import Endings, closing_id, open_tokenizer
from moetrain.data.pretokenized.file_names import by_name
from moetrain.data.pretokenized.token_files import (
    SHARE,
    Member,
    TokenFile,
    TokenFiles,
    open_files,
    refuse_shared_files,
    warn_of_equal_files,
)
from moetrain.data.pretokenized.token_indexes import FileRequest, TokenIndexes
from moetrain.errors import DataError
from moetrain.files import shown
from moetrain.interop.megatron_blend import parse_blend
from moetrain.interop.megatron_index import read_dataset
from moetrain.interop.packages import require

_FORMAT = "moetrain-megatron-2"
_SUFFIXES = (".bin", ".idx")

log = logging.getLogger(__name__)


class _Dataset(NamedTuple):
    """A dataset to open."""

    domain: str
    prefix: Path
    weight: float | None  # share of the samples; None where it follows from the size


def open_indexed(*, path: str, tokenizer: str, vocab_size: int, end_token: str | None = None,
                 held_out: str | None = None, held_out_share: float = float(SHARE), split: str = "respect",
                 weights: Mapping[str, float] | None = None, indexes: TokenIndexes = TokenIndexes(),
                 account: TokenAccount | None = None) -> TokenFiles:
    """Open indexed datasets.

    Args:
        path: a prefix, several of them with or without weights, or a folder.
        tokenizer: `none`, `bytes` or the path of a tokenizer.json, which defines its own vocabulary.
        vocab_size: size of the vocabulary where the tokenizer is `none`.
        end_token: id that ends a document; None takes the one that almost all documents end in.
        held_out: datasets to evaluate on, in the syntax of `path`, without weights.
        held_out_share: share of a domain's documents to hold out.
        split: `respect` a split that a folder holds, or `merge` it.
        weights: data.weights; must be empty where `path` has weights.
        indexes: indexes of files that were read before, and where to store new ones.
        account: records what becomes of every file.

    Returns:
        The opened files, split into training and held-out tokens.
    """
    require("megatron.core", extra="megatron", key="data=megatron")
    encoder, typed = open_tokenizer(tokenizer, end_token)
    vocabulary = encoder.vocab_size if encoder else vocab_size
    train, valid, ignored = _datasets(path, held_out, merge=split == "merge")
    if account is not None:
        _record(account, path, held_out, train, valid, ignored)
    shares = _shares(path, train, weights or {})
    files = indexes.open([FileRequest(tokens, (index,)) for tokens, index in map(_files, train + valid)],
                         settings=["megatron"], vocab_size=vocabulary,
                         read=lambda path, report: read_dataset(path.with_suffix(""), vocabulary, report))
    opened, evaluated = list(zip(train, files)), list(zip(valid, files[len(train):]))
    warn_of_equal_files(file for _, file in opened)
    refuse_shared_files((file for _, file in opened), (file for _, file in evaluated))
    end_id = closing_id([_endings(dataset, file) for dataset, file in opened + evaluated],
                        typed=typed, encoder=encoder)
    share = as_fraction(held_out_share) if not valid else Fraction(0)
    domains = sorted({dataset.domain for dataset in train + valid})
    members = [*(Member(domains.index(dataset.domain), file, _trained(file, share))
                 for dataset, file in opened),
               *(Member(domains.index(dataset.domain), file, np.zeros(len(file.starts) - 1, np.int64))
                 for dataset, file in evaluated)]
    members.sort(key=lambda member: member.domain)
    return open_files(Path(path), _FORMAT, members, domains, vocab_size=vocabulary, tokenizer=encoder,
                      end_id=end_id, settings=[], shares=shares)


# --- which datasets there are


def _datasets(path: str, held_out: str | None, *,
              merge: bool) -> tuple[list[_Dataset], list[_Dataset], list[tuple[_Dataset, str]]]:
    """Sort all datasets into those to train on, those to hold out, and those to leave alone, with the reason.

    None is held out where a share of the documents is.
    """
    blend = parse_blend(path, "data.path")
    if blend.weights and any(prefix.is_dir() for prefix in blend.prefixes):
        raise DataError(164, "a blend of datasets is not understood", where=f"data.path={path}",
                        why="a weight stands before a folder, which may hold several datasets",
                        next="data.path='<weight> <prefix> <weight> <prefix>'")
    valid = [] if held_out is None else _name_datasets(_expand(_valid_prefixes(held_out)), VALID)
    if len(blend.prefixes) == 1 and blend.prefixes[0].is_dir():
        train, own, ignored = _in_folder(
            blend.prefixes[0], merge=merge, apart=None if held_out is None else TRAIN)
    else:
        prefixes = _expand(blend.prefixes)
        train, own, ignored = _name_datasets(prefixes, None if held_out is None else TRAIN), [], []
        weights: Sequence[float | None] = blend.weights or [None] * len(train)
        train = [dataset._replace(weight=weight) for dataset, weight in zip(train, weights)]
    taken = {os.path.realpath(dataset.prefix) for dataset in valid}
    ignored = [(dataset, why) for dataset, why in ignored if os.path.realpath(dataset.prefix) not in taken]
    ignored += [(dataset, HELD_OUT) for dataset in train if os.path.realpath(dataset.prefix) in taken]
    train = [dataset for dataset in train if os.path.realpath(dataset.prefix) not in taken]
    if not train:
        raise DataError(70, "there is no indexed dataset", where=f"{path} (data.path)",
                        why="data.held_out takes all of it",
                        next="data.path=<prefix of a .bin and .idx, without the ending, or a folder of them>")
    return train, valid or own, ignored


def _in_folder(folder: Path, *, merge: bool,
               apart: str | None) -> tuple[list[_Dataset], list[_Dataset], list[tuple[_Dataset, str]]]:
    """Sort the datasets of a folder into those to train on, to hold out, and to leave alone, with the reason.

    Args:
        folder: the folder.
        merge: whether to ignore a split that the names give.
        apart: `train` where data.held_out is given: datasets called `valid` are then left alone, too.
    """
    files = (prefix.relative_to(folder).with_name(f"{prefix.name}.idx") for prefix in _prefixes(folder))
    named: dict[str, list[_Dataset]] = {TRAIN: [], VALID: [], TEST: []}
    for entry in by_name(map(PurePosixPath, files), shards=False, merge=merge, apart=apart):
        named[entry.split].append(_Dataset(entry.domain, folder / entry.path.stem, None))
    ignored = named[TEST] + (named[VALID] if apart else [])
    if ignored:
        log.info("left alone, as a test set is: %s",
                 shown(", ".join(dataset.prefix.name for dataset in ignored)))
    reasons = [(dataset, split_reason(split)) for split in (TEST, VALID) if split == TEST or apart
               for dataset in named[split]]
    return named[TRAIN], [] if apart else named[VALID], reasons


def _record(account: TokenAccount, path: str, held_out: str | None, train: list[_Dataset],
            valid: list[_Dataset], ignored: list[tuple[_Dataset, str]]) -> None:
    """Record in the account what becomes of every file."""
    def files(named: list[_Dataset], side: str) -> list[tuple[Path, str]]:
        return [(file, side) for dataset in named for file in _files(dataset)]

    account.add("data.path", path,
                read=files(train, TRAINED) + (files(valid, HELD) if held_out is None else []),
                alone=[(file, why) for dataset, why in ignored for file in _files(dataset)])
    if held_out is not None:
        account.add("data.held_out", held_out, read=files(valid, HELD))
    for tokens, index in map(_files, train + valid):
        account.note(index, f"index of {tokens.name}")


def _files(dataset: _Dataset) -> tuple[Path, Path]:
    return Path(f"{dataset.prefix}.bin"), Path(f"{dataset.prefix}.idx")


def _valid_prefixes(held_out: str) -> list[Path]:
    blend = parse_blend(held_out, "data.held_out")
    if blend.weights is not None:
        raise DataError(164, "a blend of datasets is not understood", where=f"data.held_out={held_out}",
                        why="it has weights, and held-out data is evaluated domain by domain, "
                            "each as a whole",
                        next=f"data.held_out='{' '.join(map(str, blend.prefixes))}'")
    return blend.prefixes


def _expand(paths: list[Path]) -> list[Path]:
    return [prefix for path in paths for prefix in _prefixes(path)]


def _name_datasets(prefixes: list[Path], apart: str | None) -> list[_Dataset]:
    """Name every dataset by the shortest end of its path that distinguishes it.

    `apart` is the split that the datasets belong to. It is left out of the names, so that wiki_train
    and wiki_valid are one domain.
    """
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
    return [_Dataset(name, prefix, None) for name, prefix in zip(names, prefixes)]


def _shares(path: str, named: list[_Dataset], weights: Mapping[str, float]) -> dict[str, float] | None:
    if named[0].weight is None:
        return None
    if weights:
        raise DataError(164, "a blend of datasets is not understood", where=f"data.path={path}, data.weights",
                        why="weights are given twice: those of data.path are shares of the samples, "
                            "those of data.weights factors on them",
                        next="~data.weights, or data.path without weights")
    return {dataset.domain: dataset.weight for dataset in named if dataset.weight is not None}


def _prefixes(path: Path) -> list[Path]:
    """Prefixes of the datasets in a folder, or the one that a path names."""
    if path.is_dir():
        found = sorted({file.with_suffix("") for suffix in ("*.idx", "*.bin") for file in path.glob(suffix)})
    else:
        found = [path.with_suffix("") if path.suffix in (".idx", ".bin") else path]
    for prefix in found or [path / "<name>"]:
        for suffix in _SUFFIXES:
            file = Path(f"{prefix}{suffix}")
            if not file.is_file():
                raise DataError(
                    70, "there is no indexed dataset", where=f"{path} (data.path)",
                    why=f"{file} is not there",
                    next="data.path=<prefix of a .bin and .idx, without the ending, or a folder of them>")
    return found


def _endings(dataset: _Dataset, file: TokenFile) -> Endings:
    assert file.index.ending is not None, dataset
    return Endings(str(dataset.prefix), file.index.documents, *file.index.ending)


def _trained(file: TokenFile, share: Fraction) -> np.ndarray:
    """Number of tokens at the beginning of each document to train on; the rest is held out."""
    sizes = np.diff(file.starts)
    count = len(sizes)
    if count * share < 1:
        return sizes - sizes * share.numerator // share.denominator
    trained = sizes.copy()
    trained[permutation(("megatron", file.content), count)[:int(count * share)]] = 0
    return trained

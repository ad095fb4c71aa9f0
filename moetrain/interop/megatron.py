"""data=megatron: Megatron-Core's indexed datasets (<prefix>.bin, <prefix>.idx) as training data.

    open_indexed(path, tokenizer, vocab_size, …) -> what data.token_dataset.TokenDataset reads in place of a prepared folder

A dataset is a domain; in a folder of several, each is one, by the name of its files. data.path also takes what Megatron's
--data-path takes (`megatron_blend.py`): several prefixes, and before each the share of the samples that comes from it.
Documents lie end to end as the preprocessing wrote them: an end-of-document id is where it put one, none is added. The index
is read by Megatron's own `IndexedDataset` (`megatron_index.py`), the tokens by `data/tokens/blocks.py`; windows, order and sample
ids are those of data=tokens. Both files of a dataset are read whole once, and known by an index of our own from then on
(`data/pretokenized/token_indexes.py`).

Held out is data.held_out, else what a folder calls `valid` beside `train`, else a share of the documents of each domain (one
in 20), chosen by a permutation keyed by the domain's content; where a domain has too few documents for that, each of them
gives up that share of its tokens, the last. Duplicates are not looked for.

What the documents end in is looked at (`data/pretokenized/end_token.py`): almost all of them end in the id that --append-eod wrote.
"""

import logging
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from moetrain.data.account.ledgers import HELD, HELD_OUT, TRAINED
from moetrain.data.batches.permutation import permutation
from moetrain.data.corpus.given_splits import TEST, TRAIN, VALID, without_split
from moetrain.data.corpus.split import exact
from moetrain.data.pretokenized.account import TokenAccount, split_reason
from moetrain.data.pretokenized.end_token import Endings, closing_id, open_tokenizer
from moetrain.data.pretokenized.file_names import by_name
from moetrain.data.pretokenized.token_files import (
    SHARE,
    Member,
    TokenFile,
    TokenFiles,
    open_files,
    refuse_leak,
    say_twice,
)
from moetrain.data.pretokenized.token_indexes import TokenIndexes, Wanted
from moetrain.errors import DataError
from moetrain.files import shown
from moetrain.interop.megatron_blend import parse_blend
from moetrain.interop.megatron_index import read_dataset
from moetrain.interop.packages import require

_FORMAT = "moetrain-megatron-2"
_SUFFIXES = (".bin", ".idx")

log = logging.getLogger(__name__)


class _Named(NamedTuple):
    """A dataset to open. weight: its share of the samples; None where they come by their size."""

    domain: str
    prefix: Path
    weight: float | None


def open_indexed(*, path: str, tokenizer: str, vocab_size: int, end_token: str | None = None,
                 held_out: str | None = None, held_out_share: float = float(SHARE), split: str = "respect",
                 weights: Mapping[str, float] | None = None, indexes: TokenIndexes = TokenIndexes(),
                 account: TokenAccount | None = None) -> TokenFiles:
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
        indexes: what is known of the files, and where to keep what is found.
        account: is told what becomes of every file.
    """
    require("megatron.core", extra="megatron", key="data=megatron")
    encoder, typed = open_tokenizer(tokenizer, end_token)
    vocabulary = encoder.vocab_size if encoder else vocab_size
    train, valid, alone = _datasets(path, held_out, merge=split == "merge")
    if account is not None:
        _tell(account, path, held_out, train, valid, alone)
    shares = _shares(path, train, weights or {})
    files = indexes.open([Wanted(tokens, (index,)) for tokens, index in map(_files, train + valid)],
                         settings=["megatron"], vocab_size=vocabulary,
                         read=lambda path, report: read_dataset(path.with_suffix(""), vocabulary, report))
    opened, evaluated = list(zip(train, files)), list(zip(valid, files[len(train):]))
    say_twice(file for _, file in opened)
    refuse_leak((file for _, file in opened), (file for _, file in evaluated))
    end_id = closing_id([_endings(one, file) for one, file in opened + evaluated], typed=typed, encoder=encoder)
    share = exact(held_out_share) if not valid else Fraction(0)
    domains = sorted({one.domain for one in train + valid})
    members = [*(Member(domains.index(one.domain), file, _trained(file, share)) for one, file in opened),
               *(Member(domains.index(one.domain), file, np.zeros(len(file.starts) - 1, np.int64)) for one, file in evaluated)]
    members.sort(key=lambda member: member.domain)
    return open_files(Path(path), _FORMAT, members, domains, vocab_size=vocabulary, tokenizer=encoder, end_id=end_id,
                      settings=[], shares=shares)


# --- which datasets there are


def _datasets(path: str, held_out: str | None, *, merge: bool) -> tuple[list[_Named], list[_Named], list[tuple[_Named, str]]]:
    """(what is trained on, what is held out; empty where a share is, what is left alone and why)."""
    blend = parse_blend(path, "data.path")
    if blend.weights and any(prefix.is_dir() for prefix in blend.prefixes):
        raise DataError(164, "a blend of datasets is not understood", where=f"data.path={path}",
                        why="a weight stands before a folder, which may hold several datasets",
                        next="data.path='<weight> <prefix> <weight> <prefix>'")
    valid = [] if held_out is None else _names(_every(_valid_prefixes(held_out)), VALID)
    if len(blend.prefixes) == 1 and blend.prefixes[0].is_dir():
        train, own, alone = _in_folder(blend.prefixes[0], merge=merge, apart=None if held_out is None else TRAIN)
    else:
        prefixes = _every(blend.prefixes)
        train, own, alone = _names(prefixes, None if held_out is None else TRAIN), [], []
        train = [one._replace(weight=weight) for one, weight in zip(train, blend.weights or [None] * len(train))]
    taken = {os.path.realpath(one.prefix) for one in valid}
    alone = [(one, why) for one, why in alone if os.path.realpath(one.prefix) not in taken]
    alone += [(one, HELD_OUT) for one in train if os.path.realpath(one.prefix) in taken]
    train = [one for one in train if os.path.realpath(one.prefix) not in taken]
    if not train:
        raise DataError(70, "there is no indexed dataset", where=f"{path} (data.path)", why="data.held_out takes all of it",
                        next="data.path=<prefix of a .bin and .idx, without the ending, or a folder of them>")
    return train, valid or own, alone


def _in_folder(folder: Path, *, merge: bool, apart: str | None) -> tuple[list[_Named], list[_Named], list[tuple[_Named, str]]]:
    """(what is trained on, what is held out, what is left alone and why) of the datasets of a folder.

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
    reasons = [(one, split_reason(split)) for split in (TEST, VALID) if split == TEST or apart for one in named[split]]
    return named[TRAIN], [] if apart else named[VALID], reasons


def _tell(account: TokenAccount, path: str, held_out: str | None, train: list[_Named], valid: list[_Named],
          alone: list[tuple[_Named, str]]) -> None:
    """Every file, by what becomes of it."""
    def files(named: list[_Named], side: str) -> list[tuple[Path, str]]:
        return [(file, side) for one in named for file in _files(one)]

    account.add("data.path", path, read=files(train, TRAINED) + (files(valid, HELD) if held_out is None else []),
                alone=[(file, why) for one, why in alone for file in _files(one)])
    if held_out is not None:
        account.add("data.held_out", held_out, read=files(valid, HELD))
    for tokens, index in map(_files, train + valid):
        account.note(index, f"index of {tokens.name}")


def _files(one: _Named) -> tuple[Path, Path]:
    return Path(f"{one.prefix}.bin"), Path(f"{one.prefix}.idx")


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


def _endings(dataset: _Named, file: TokenFile) -> Endings:
    assert file.index.ending is not None, dataset
    return Endings(str(dataset.prefix), file.index.documents, *file.index.ending)


def _trained(file: TokenFile, share: Fraction) -> np.ndarray:
    """How many tokens of each document are trained on, its first; the rest is held out."""
    sizes = np.diff(file.starts)
    count = len(sizes)
    if count * share < 1:
        return sizes - sizes * share.numerator // share.denominator
    trained = sizes.copy()
    trained[permutation(("megatron", file.content), count)[:int(count * share)]] = 0
    return trained

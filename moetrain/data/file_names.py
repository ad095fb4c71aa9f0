"""What the names of token files say: which split a file is of, which domain, and which shard comes after which.

    train.bin  val.bin                              a split, one domain
    fineweb_train_000001.bin  fineweb_val_000000.bin    shards of the domain fineweb
    train/wiki-0.npy  valid/wiki-0.npy  test/wiki-0.npy

A split is one where a name with `train` lies at the same level: a file or folder named `test` alone is data like any other.
"""

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

SPLITS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
          "eval": "valid", "test": "test", "testing": "test"}
UNNAMED = "tokens"                       # the domain of a train.bin, whose name says nothing else
# Behind a separator, or at least three digits: 000001, -00000-of-01024, part-0-00000; not gpt2 or 10B.
_NUMBERS = re.compile(r"(?:[-_.]+(?:of[-_.]+)?\d+)+$|\d{3,}$")


class Named(NamedTuple):
    """A file by what its name says. split: train, valid or test."""

    path: PurePath
    domain: str
    split: str


class _Found(NamedTuple):
    """A part of a path that names a split. rest: folders and stem without it. level: folders above it."""

    split: str
    level: tuple[str, ...]
    rest: tuple[str, ...]


def by_name(paths: Iterable[PurePath], *, shards: bool = True, held_out: bool = False) -> list[Named]:
    """Files of one folder by domain, split and number.

    Args:
        paths: relative to the folder.
        shards: whether files whose names differ by a number are one domain.
        held_out: whether they are known to be a held-out set, whose names need no `train` beside them.
    """
    found = [(path, _split_of(path)) for path in paths]
    trained = {part.level for _, part in found if part and part.split == "train"}
    named = []
    for path, part in found:
        taken = part is not None and (held_out or part.level in trained)
        rest = part.rest if part and taken else (*path.parent.parts, path.stem)
        named.append(Named(path, _domain(rest, shards), part.split if part and taken else "train"))
    return sorted(named, key=lambda one: (one.domain, one.split, natural(str(one.path))))


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts numbers by what they are: 2 before 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]


def _domain(parts: tuple[str, ...], shards: bool) -> str:
    """The first folder, else the stem."""
    *folders, stem = parts
    return folders[0] if folders else (_NUMBERS.sub("", stem) if shards else stem) or UNNAMED


def _split_of(path: PurePath) -> _Found | None:
    folders = path.parent.parts
    for number, folder in enumerate(folders):
        if split := SPLITS.get(folder.lower()):
            return _Found(split, folders[:number], (*folders[:number], *folders[number + 1:], path.stem))
    pieces = re.split(r"([._-]+)", path.stem)
    for number in range(len(pieces) - 1, -1, -2):
        if split := SPLITS.get(pieces[number].lower()):
            before, after = pieces[:max(number - 1, 0)], pieces[number + 1:] if number else pieces[2:]
            return _Found(split, folders, (*folders, "".join(before + after)))
    return None

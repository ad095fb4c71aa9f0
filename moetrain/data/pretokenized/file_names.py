"""Names of token files: the split, the domain and the order of shards that they say.

    train.bin  val.bin                                     one domain, trained on and held out
    fineweb_train_000001.bin  fineweb_val_000000.bin       shards of the domain fineweb
    train/wiki-0.npy  valid/wiki-0.npy  test/wiki-0.npy    domain wiki; a test split is left alone

`corpus/given_splits.py` decides which names are a split.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from moetrain.data.corpus.given_splits import TRAIN, VALID, find_splits, without_split

UNNAMED = "text"                         # domain of a file whose name is only a number
# Behind a separator, or of three digits or more: 000001, -00000-of-01024, part-0-00000; not gpt2, 10B.
_NUMBERS = re.compile(r"(?:[-_.]+(?:of[-_.]+)?\d+)+$|\d{3,}$")


class NamedFile(NamedTuple):
    """A file, with what its name says.

    Args:
        path: name, relative to the folder.
        domain: its domain.
        split: TRAIN, VALID or TEST.
    """

    path: PurePosixPath
    domain: str
    split: str


def by_name(paths: Iterable[PurePosixPath], *, shards: bool = True, merge: bool = False,
            apart: str | None = None) -> list[NamedFile]:
    """Files of one folder, sorted by domain, split and number.

    Args:
        paths: names, relative to the folder.
        shards: whether files whose names differ by a number are one domain.
        merge: whether to ignore a split that is found.
        apart: split of the files, TRAIN or VALID, where the other one lies elsewhere.
    """
    paths = list(paths)
    members = {} if merge else find_splits(map(str, paths))
    named = []
    for path in paths:
        member = members.get(str(path))
        split = VALID if apart == VALID else member.role if member else TRAIN
        label = without_split(str(path)) if apart else member.label if member else str(path)
        named.append(NamedFile(path, _domain(PurePosixPath(label), shards), split))
    return sorted(named, key=lambda one: (one.domain, one.split, natural_key(str(one.path))))


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that compares numbers by value: 2 before 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]


def _domain(label: PurePosixPath, shards: bool) -> str:
    """The first folder, else the name without suffix and shard number."""
    folders = label.parent.parts
    return folders[0] if folders else (_NUMBERS.sub("", label.stem) if shards else label.stem) or UNNAMED

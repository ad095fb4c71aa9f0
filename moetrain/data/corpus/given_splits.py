"""Splits that a corpus comes with, recognized by file and folder names.

Examples are `train/ valid/ test/`, `ptb.train.txt ptb.valid.txt`, and `train-00000-of-00010.parquet` beside
`test-00000-of-00001.parquet`.

A file or folder belongs to a split if a part of its name says so and another name at the same level names the
other side: `test` without a `train` beside it is no split. The part comes first or last in the name or
between dots, or the two names differ in nothing else but numbers and suffixes. Source code and documents
about a program are never a split: `train.py` and `test.py`, `training.md` and `testing.md` are about training
and testing.

Where such folders are nested, the test split wins over the validation split, and that over training. `eval`
means validation, or test where there is a validation split too.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from moetrain.data.reading.compressed import inner_name

TRAIN, VALID, TEST = "train", "valid", "test"
_EVAL = "eval"
_STRICTNESS = {TRAIN: 0, VALID: 1, TEST: 2}
_MORE = r"(?:[-_ ]?(?:set|data|split|files?))?"
# A part of a name between characters that are no letters or digits.
_WORDS = re.compile(
    rf"(?<![^\W_])(?:(?P<train>train(?:ing)?{_MORE})|(?P<test>test(?:ing)?{_MORE})|(?P<eval>eval(?:uation)?{_MORE})"
    rf"|(?P<valid>(?:valid(?:ation|ate)?|val|dev(?:el|elopment)?|held[-_]?out|holdout){_MORE}))\d*(?![^\W_])",
    re.IGNORECASE)
_PROSE = frozenset(".adoc .html .md .rst .tex".split())
_ABOUT = _PROSE | frozenset(
    ".c .cc .cfg .cmake .cpp .cs .css .cu .cuh .cxx .go .h .hpp .hs .ini .ipynb .java .jl .js .kt .lua .m "
    ".ml .php .pl .py .pyi .pyx .r .rb .rs .scala .sh .sql .swift .toml .ts .tsx .yaml .yml .zig".split())
_NUMBERING = {"of", "part", "shard"}
_HASH = re.compile(r"(?=.*\d)[0-9a-f]{8,}")  # as in news-train-00000-of-00001-2f6c2d1a9f7a2d4b.parquet


class Member(NamedTuple):
    """Membership of a file in a split.

    Args:
        role: TRAIN, VALID or TEST.
        label: name without the parts that say the split; the domain is derived from it.
    """

    role: str
    label: str


class _Word(NamedTuple):
    """The part of a name that says a split.

    Args:
        role: the split, or `eval`.
        start: where the part begins in the name.
        end: where it ends.
        rest: the other parts of the name, without suffix, numbers and hashes.
        stands_out: whether the part comes first or last, or between dots.
    """

    role: str
    start: int
    end: int
    rest: tuple[str, ...]
    stands_out: bool


def find_splits(names: Iterable[str]) -> dict[str, Member]:
    """Files that belong to a split, by name. Names are relative and written with slashes."""
    names = list(names)
    levels: dict[str, dict[str, _Word]] = {}
    known = {""}                                         # folders already looked at
    for name in names:
        place, is_file = name, True
        while place not in known:
            known.add(place)
            folder, _, part = place.rpartition("/")
            if (word := _word(part, is_file=is_file)) is not None:
                levels.setdefault(folder, {})[part] = word
            place, is_file = folder, False
    paired = {folder: found for folder, words in levels.items() if (found := _paired(words))}
    return {name: member for name in names if (member := _member(name, paired)) is not None} if paired else {}


def unpaired(names: Iterable[str], members: Collection[str]) -> list[str]:
    """Names that say validation or test but belong to no split, where others say training.

    They may be meant as a split: `ptb.test.md` may be, beside `ptb.train.txt`, because documents, unlike
    source code, can be text with another suffix.
    """
    named: dict[bool, list[str]] = {True: [], False: []}
    for name in names:
        parts = name.split("/")
        words = [_word(part, is_file=depth == len(parts) - 1, about=_ABOUT - _PROSE)
                 for depth, part in enumerate(parts)]
        roles = {word.role for word in words if word is not None
                 and (word.rest or PurePosixPath(name).suffix not in _PROSE)}
        if roles:
            named[roles == {TRAIN}].append(name)
    return [name for name in named[False] if name not in members] if named[True] else []


def without_split(name: str) -> str:
    """A name without the parts that say its split, for a file whose other side lies elsewhere."""
    parts = name.split("/")
    words = [_word(part, is_file=depth == len(parts) - 1) for depth, part in enumerate(parts)]
    kept = [part if word is None else _without(part, word, is_file=depth == len(parts) - 1)
            for depth, (part, word) in enumerate(zip(parts, words))]
    return "/".join(part for part in kept if part)


def _word(name: str, *, is_file: bool, about: frozenset[str] = _ABOUT) -> _Word | None:
    """The part of a name that says its split.

    It is None if no part does, if two disagree, or if the suffix is one of `about`.
    """
    found = list(_WORDS.finditer(name))
    if not found or len({match.lastgroup for match in found}) > 1:
        return None
    first, stem = found[0], name
    if is_file:
        inner = inner_name(name)
        suffix = PurePosixPath(inner).suffix
        if suffix.lower() in about:
            return None
        stem = inner.removesuffix(suffix) if first.end() <= len(inner) - len(suffix) else inner
    before, after = _parts(stem[:first.start()]), _parts(stem[first.end():])
    between_dots = stem[:first.start()].endswith(".") and stem[first.end():].startswith(".")
    return _Word(str(first.lastgroup), first.start(), first.end(), (*before, *after),
                 not before or not after or between_dots)


def _parts(text: str) -> list[str]:
    """Parts of a name that distinguish it: no numbers, hashes and words of numbering."""
    return [part for part in re.split(r"[\W_]+", text.lower())
            if part and not part.isdigit() and part not in _NUMBERING and not _HASH.fullmatch(part)]


def _paired(words: dict[str, _Word]) -> dict[str, _Word]:
    """Names of one level that form a split."""
    sides = {side: [word for word in words.values() if (word.role == TRAIN) == side]
             for side in (True, False)}
    rests = {side: {word.rest for word in members} for side, members in sides.items()}
    outstanding = {side: any(word.stands_out for word in members) for side, members in sides.items()}
    found = {}
    for name, word in words.items():
        other = word.role != TRAIN
        if word.rest in rests[other] or word.stands_out and outstanding[other]:
            found[name] = word
    has_valid = any(word.role == VALID for word in found.values())
    return {name: word._replace(role=(TEST if has_valid else VALID) if word.role == _EVAL else word.role)
            for name, word in found.items()}


def _member(name: str, levels: dict[str, dict[str, _Word]]) -> Member | None:
    parts = name.split("/")
    roles, kept = [], []
    for depth, part in enumerate(parts):
        word = levels.get("/".join(parts[:depth]), {}).get(part)
        if word is not None:
            roles.append(word.role)
            part = _without(part, word, is_file=depth == len(parts) - 1)
        kept += [part] if part else []
    return Member(max(roles, key=_STRICTNESS.__getitem__), "/".join(kept)) if roles else None


def _without(part: str, word: _Word, *, is_file: bool) -> str:
    """A name without the part that says its split, and without what separates that part.

    A file whose name has nothing left but numbers is called `text`.
    """
    before, after = part[:word.start].rstrip("._- "), part[word.end:]
    if is_file and not before and (not word.rest or after.startswith(".")):
        _, dot, suffixes = after.partition(".")
        return f"text{dot}{suffixes}"
    return before + after if before else after.lstrip("._- ")

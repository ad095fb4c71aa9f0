"""data=memmap: token files of other trainers (nanoGPT, llm.c, modded-nanogpt, OLMo) as training data.

    open_memmap(path, tokenizer, vocab_size, …) -> what data.token_dataset.TokenDataset reads in place of a prepared folder

data.path is a file, a pattern of files or a folder; `data/token_formats.py` says which formats there are and `data/file_names.py`
what names tell. A file ends a document, as does every end token, if one is known (data.end_token, or the tokenizer's). Held out
is data.held_out, else what lies beside `train` as `val`, else the last share of each domain's tokens.

Files are read with `pread` (`data/token_files.py`): memory maps are how the others read them.
"""

import glob
import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from moetrain.data.end_token import open_tokenizer
from moetrain.data.file_names import Named, by_name
from moetrain.data.given_splits import TEST, TRAIN, VALID
from moetrain.data.split import exact
from moetrain.data.token_files import (SHARE, Member, TokenFile, TokenFiles, last_share, open_files, read_once,
                                       refuse_leak, say_twice, token_file)
from moetrain.data.token_formats import SUFFIXES, NotTokensError, token_format
from moetrain.errors import DataError
from moetrain.files import open_regular, reason, shown

_FORMAT = "moetrain-memmap-1"
_WIDTH_HEAD = 4 << 20                # bytes of raw ids that are compared with the vocabulary to tell their width
_MOST_NAMED = 5                      # files that a line of the log names

log = logging.getLogger(__name__)


class _Files(NamedTuple):
    """Files below a folder by what they are for; left: what is no token file."""

    folder: Path
    train: list[Named]
    heldout: list[Named]
    test: list[Named]
    left: list[PurePosixPath]


class _Reading(NamedTuple):
    """How files are read. dtype: data.dtype. end_id: closes a document, if one is known."""

    dtype: str
    vocab_size: int
    end_id: int | None


def open_memmap(*, path: str, tokenizer: str, vocab_size: int, dtype: str = "auto", end_token: str | None = None,
                held_out: str | None = None, held_out_share: float = float(SHARE), split: str = "respect") -> TokenFiles:
    """Open token files.

    Args:
        path: a file, a pattern of files, or a folder.
        tokenizer: none, bytes or the path of a tokenizer.json, which brings its own vocabulary.
        vocab_size: the vocabulary where the tokenizer is none.
        dtype: of ids without a header: auto, uint16 or uint32.
        end_token: id that closes a document; None: the tokenizer's.
        held_out: a file, a pattern or a folder to evaluate on.
        held_out_share: of the tokens of a domain without held-out files, its last.
        split: respect a split that is there, or merge it.
    """
    encoder, typed = open_tokenizer(tokenizer, end_token)
    end_id = typed if typed is not None else encoder.end_id if encoder else None
    reading = _Reading(dtype, encoder.vocab_size if encoder else vocab_size, end_id)
    files, heldout = _both(path, held_out, merge=split == "merge")
    trained = _read_all(files.folder, files.train, reading)
    evaluated = _read_all(heldout.folder, heldout.heldout, reading)
    say_twice(file for _, file in trained)
    refuse_leak((file for _, file in trained), (file for _, file in evaluated))
    _check_end([file for _, file in trained + evaluated], reading, typed is not None)
    domains = sorted({domain for domain, _ in trained + evaluated})
    share = exact(held_out_share) if held_out is None else Fraction(0)
    members = list(_members(domains, trained, evaluated, share))
    opened = open_files(Path(path), _FORMAT, members, domains, vocab_size=reading.vocab_size, tokenizer=encoder,
                        end_id=end_id, settings=[end_id])
    _say_what(files, heldout, trained + evaluated, opened)
    return opened


def _members(domains: list[str], trained: list[tuple[str, TokenFile]], evaluated: list[tuple[str, TokenFile]],
             share: Fraction) -> Iterator[Member]:
    """The files by domain. share: held out where a domain has no file for it."""
    own = {domain for domain, _ in evaluated}
    for number, name in enumerate(domains):
        files = [file for domain, file in trained if domain == name]
        cut = _last_share(files, Fraction(0) if name in own else share)
        yield from (Member(number, file, trained) for file, trained in zip(files, cut))
        yield from (Member(number, file, np.zeros(len(file.starts) - 1, np.int64))
                    for domain, file in evaluated if domain == name)


def _last_share(files: list[TokenFile], share: Fraction) -> list[np.ndarray]:
    """`trained` of the files of a domain: the last share of all their tokens is held out, from its last files."""
    left = int(sum(int(file.starts[-1]) for file in files) * share)
    found: list[np.ndarray] = []
    for file in reversed(files):
        size = int(file.starts[-1])
        part = Fraction(min(left, size), size)
        found.append(last_share(file, part))
        left -= min(left, size)
    return found[::-1]


# --- which files there are


def _both(path: str, held_out: str | None, *, merge: bool) -> tuple[_Files, _Files]:
    """(what is trained on, what is held out): of data.path, and of data.held_out where it is given."""
    files = _find(path, "data.path", merge=merge, apart=None if held_out is None else TRAIN)
    heldout = files
    if held_out is not None:
        heldout = _find(held_out, "data.held_out", merge=True, apart=VALID)
        taken = {os.path.realpath(heldout.folder / one.path) for one in heldout.heldout}

        def others(named: list[Named]) -> list[Named]:
            return [one for one in named if os.path.realpath(files.folder / one.path) not in taken]

        files = files._replace(train=others(files.train), test=others(files.test + files.heldout))
        if not files.train:
            raise _missing(path, "data.path", "data.held_out takes all of it")
        _say_left(heldout)
    _say_left(files)
    return files, heldout


def _find(path: str, key: str, *, merge: bool, apart: str | None) -> _Files:
    """The files that a key names, by what they are for.

    Args:
        path: its value.
        key: its name.
        merge: whether a split that is there is left out of account.
        apart: see `by_name`.
    """
    given, left = Path(path), []
    if given.is_dir():
        folder = given
        every = [PurePosixPath(file.relative_to(given)) for file in sorted(given.rglob("*")) if file.is_file()]
        visible = [file for file in every if not any(part.startswith(".") for part in file.parts)]
        chosen = by_name((file for file in visible if file.suffix in SUFFIXES), merge=merge, apart=apart)
        left = [file for file in visible if file.suffix not in SUFFIXES]
    else:
        named = [given] if given.exists() else [Path(name) for name in sorted(glob.glob(path)) if os.path.isfile(name)]
        folder = named[0].parent if named else given.parent
        if any(file.parent != folder for file in named):
            raise _missing(path, key, "the pattern names files of several folders; give the folder above them")
        chosen = _with_siblings(folder, {PurePosixPath(file.name) for file in named}, merge=merge, apart=apart)
    by_split = {split: [one for one in chosen if one.split == split] for split in (TRAIN, VALID, TEST)}
    if not by_split[VALID if apart == VALID else TRAIN]:
        named = " or ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise _missing(path, key, f"it holds no file named {named}" if os.path.exists(path) else "it is not there")
    return _Files(folder, by_split[TRAIN], by_split[VALID], by_split[TEST], left)


def _with_siblings(folder: Path, names: set[PurePosixPath], *, merge: bool, apart: str | None) -> list[Named]:
    """Files that were named, and what lies beside them as the held-out set of their domains."""
    if apart or merge or not names:
        return [one._replace(split=apart or TRAIN) for one in by_name(names, merge=True, apart=apart)]
    suffixes = {name.suffix for name in names}
    beside = {PurePosixPath(file.name) for file in folder.iterdir() if file.suffix in suffixes and file.is_file()}
    every = by_name(names | beside)
    trained = [one for one in every if one.path in names and one.split == TRAIN]
    if len(trained) < len(names):                            # val.bin itself was named: it is what is trained on
        return [one._replace(split=TRAIN) for one in every if one.path in names]
    domains = {one.domain for one in trained}
    return trained + [one for one in every if one.split == VALID and one.domain in domains]


def _missing(path: str, key: str, why: str) -> DataError:
    return DataError(160, "there are no token files", where=f"{path} ({key})", why=why,
                     next=f"{key}=<a .bin or .npy of token ids, or a folder of them>")


# --- reading one


def _read_all(folder: Path, files: list[Named], reading: _Reading) -> list[tuple[str, TokenFile]]:
    return [(one.domain, _read(folder / one.path, reading)) for one in files]


def _read(path: Path, reading: _Reading) -> TokenFile:
    try:
        found = token_format(path)
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            dtype = found.dtype or _width(file, status.st_size, reading)
            tokens = (status.st_size - found.start) // dtype.itemsize if found.tokens is None else found.tokens
            _check_size(path, status.st_size, found.start + tokens * dtype.itemsize, tokens, dtype, found.name)
            starts = _Starts(reading.end_id)
            other = "uint16" if dtype.itemsize == 4 else "uint32"
            advice = f"; data.dtype={other} where they are not {dtype.name}" if found.dtype is None else ""
            checksums = read_once(file, path, start=found.start, tokens=tokens, dtype=dtype, vocab_size=reading.vocab_size,
                                  visit=starts.look, advice=advice)
    except NotTokensError as error:
        raise DataError(161, "a file holds no token ids", where=str(path), why=shown(error.what, 200),
                        next=error.next) from error
    except OSError as error:
        raise DataError(162, "a token file cannot be read", where=str(path), why=reason(error),
                        next="data.path=<a .bin or .npy of token ids, or a folder of them>") from error
    return token_file(path, status, start=found.start, tokens=tokens, dtype=dtype, checksums=checksums,
                      vocab_size=reading.vocab_size, starts=starts.of(tokens))


class _Starts:
    """Where documents begin: at the first token, and behind every end token."""

    def __init__(self, end_id: int | None) -> None:
        self._end_id, self._found = end_id, [np.zeros(1, np.int64)]

    def look(self, begin: int, block: np.ndarray) -> None:
        if self._end_id is not None:
            self._found.append(begin + 1 + np.flatnonzero(block == self._end_id))

    def of(self, tokens: int) -> np.ndarray:
        starts = np.concatenate(self._found)
        return np.append(starts[starts < tokens], tokens)


def _width(file: BinaryIO, size: int, reading: _Reading) -> np.dtype:
    """The type of raw ids: four bytes each where all that are looked at lie inside the vocabulary, which pairs of others do
    not: the second of two ids would be 0, or 1 in a vocabulary above 65,536, every time."""
    if reading.dtype != "auto":
        return np.dtype(f"<u{np.dtype(reading.dtype).itemsize}")
    head = np.frombuffer(os.pread(file.fileno(), min(size, _WIDTH_HEAD) // 4 * 4, 0), "<u4")
    return np.dtype("<u4" if size % 4 == 0 and len(head) and int(head.max()) < reading.vocab_size else "<u2")


def _check_size(path: Path, size: int, expected: int, tokens: int, dtype: np.dtype, name: str) -> None:
    if tokens and size == expected:
        return
    why = f"{size:,} bytes instead of {expected:,} for {tokens:,} ids ({dtype.name}, {name})"
    raise DataError(162, "a token file cannot be read", where=str(path), why=why if tokens else "it holds no id",
                    next="copy it again, or leave it out of data.path")


def _check_end(files: list[TokenFile], reading: _Reading, typed: bool) -> None:
    """The end token occurs in the tokens; otherwise every file is one document."""
    if reading.end_id is None or any(_ends(file, reading.end_id) for file in files):
        return
    why = f"id {reading.end_id} does not occur in {sum(int(file.starts[-1]) for file in files):,} tokens"
    if typed:
        raise DataError(163, "the end token does not fit the data", where=f"data.end_token={reading.end_id}", why=why,
                        next="data.end_token=<the id that closes a document>; without one a file is a document")
    log.warning("the end token of data.tokenizer is not in the data: %s; every file is one document", why)


def _ends(file: TokenFile, end_id: int) -> bool:
    size = int(file.starts[-1])
    return len(file.starts) > 2 or int(file.tokens.read(size - 1, size)[0]) == end_id


# --- what is said


def _say_left(files: _Files) -> None:
    if files.left:
        size = sum((files.folder / path).stat().st_size for path in files.left)
        log.info("left out %d files that are no token files (%s bytes): %s", len(files.left), f"{size:,}", _names(files.left))
    if files.test:
        log.info("left alone, as a test set is: %s", _names([one.path for one in files.test]))


def _say_what(files: _Files, heldout: _Files, read: list[tuple[str, TokenFile]], opened: TokenFiles) -> None:
    documents = sum(len(file.starts) - 1 for _, file in read)
    held = _names([one.path for one in heldout.heldout]) or "the end of each domain"
    log.info("%d token files of %s: %s tokens in %s documents; %s held out: %s", len(read),
             f"{len(opened.domains)} domain{'s' * (len(opened.domains) > 1)}", f"{opened.train.size + opened.heldout.size:,}",
             f"{documents:,}", f"{opened.heldout.size:,}", held)


def _names(paths: list[PurePosixPath]) -> str:
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return shown(", ".join(str(path) for path in paths[:_MOST_NAMED])) + more

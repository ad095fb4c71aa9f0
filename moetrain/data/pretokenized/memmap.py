"""`data=memmap`: token files of other trainers (nanoGPT, llm.c, modded-nanogpt, OLMo) as training data.

`open_memmap` returns what `batches/token_dataset.py` reads in place of a prepared dataset. data.path is a
file, a pattern of files or a folder; `memmap_files.py` finds the files, `file_names.py` interprets their
names, `tokens/formats.py` recognizes their formats. A document ends at the end of a file and at every end
token, if one is known (data.end_token, or the tokenizer's). Held out is data.held_out, else what lies beside
`train` as `val`, else the last share of each domain's tokens.

Files are read with `pread` (`tokens/blocks.py`); only other trainers map them into memory. Each is read whole
once and opened by its index from then on (`token_indexes.py`).
"""

import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moetrain.data.corpus.split import as_fraction
from moetrain.data.pretokenized.account import TokenAccount
from moetrain.data.pretokenized.end_token import open_tokenizer
from moetrain.data.pretokenized.file_names import NamedFile
from moetrain.data.pretokenized.memmap_files import MemmapFiles, enter_files, find_files, names_text
from moetrain.data.pretokenized.token_files import (
    SHARE,
    Member,
    TokenFile,
    TokenFiles,
    last_share,
    open_files,
    refuse_shared_files,
    warn_of_equal_files,
)
from moetrain.data.pretokenized.token_indexes import FileRequest, TokenIndexes
from moetrain.data.tokens.formats import NotTokensError, token_format
from moetrain.data.tokens.index import Ending, Report, TokenIndex, read_once
from moetrain.errors import DataError
from moetrain.files import open_regular, reason, shown

_FORMAT = "moetrain-memmap-1"
_WIDTH_HEAD = 4 << 20                # bytes of raw ids compared with the vocabulary to find their width

log = logging.getLogger(__name__)


class _Reading(NamedTuple):
    """How files are read.

    Args:
        dtype: value of data.dtype.
        vocab_size: ids of the vocabulary.
        end_id: id that closes a document; None if unknown.
    """

    dtype: str
    vocab_size: int
    end_id: int | None


def open_memmap(*, path: str, tokenizer: str, vocab_size: int, dtype: str = "auto",
                end_token: str | None = None, held_out: str | None = None,
                held_out_share: float = float(SHARE), split: str = "respect",
                indexes: TokenIndexes = TokenIndexes(), account: TokenAccount | None = None) -> TokenFiles:
    """Open token files.

    Args:
        path: a file, a pattern of files, or a folder.
        tokenizer: `none`, `bytes` or the path of a tokenizer.json, which brings its own vocabulary.
        vocab_size: ids of the vocabulary if the tokenizer is `none`.
        dtype: type of ids in files without a header: auto, uint16 or uint32.
        end_token: id that closes a document; None takes the tokenizer's.
        held_out: a file, a pattern or a folder to evaluate on.
        held_out_share: share of the tokens, the last ones, to hold out of a domain without held-out files.
        split: `respect` a split that is found, or `merge` it.
        indexes: store of the files' indexes.
        account: filled in with every file and its use.
    """
    encoder, typed = open_tokenizer(tokenizer, end_token)
    end_id = typed if typed is not None else encoder.end_id if encoder else None
    reading = _Reading(dtype, encoder.vocab_size if encoder else vocab_size, end_id)
    files, heldout = find_files(path, held_out, merge=split == "merge")
    if account is not None:
        enter_files(account, path, held_out, files, heldout)
    trained, evaluated = _open([(files.folder, files.train), (heldout.folder, heldout.heldout)], reading,
                               indexes)
    warn_of_equal_files(file for _, file in trained)
    refuse_shared_files((file for _, file in trained), (file for _, file in evaluated))
    _check_end([file for _, file in trained + evaluated], reading, typed is not None)
    domains = sorted({domain for domain, _ in trained + evaluated})
    share = as_fraction(held_out_share) if held_out is None else Fraction(0)
    members = list(_members(domains, trained, evaluated, share))
    opened = open_files(Path(path), _FORMAT, members, domains, vocab_size=reading.vocab_size,
                        tokenizer=encoder, end_id=end_id, settings=[end_id])
    _log_files(files, heldout, trained + evaluated, opened)
    return opened


def _members(domains: list[str], trained: list[tuple[str, TokenFile]], evaluated: list[tuple[str, TokenFile]],
             share: Fraction) -> Iterator[Member]:
    """The files by domain. `share` of the tokens is held out of a domain without a held-out file."""
    own = {domain for domain, _ in evaluated}
    for number, name in enumerate(domains):
        files = [file for domain, file in trained if domain == name]
        cut = _last_share(files, Fraction(0) if name in own else share)
        yield from (Member(number, file, trained) for file, trained in zip(files, cut))
        yield from (Member(number, file, np.zeros(len(file.starts) - 1, np.int64))
                    for domain, file in evaluated if domain == name)


def _last_share(files: list[TokenFile], share: Fraction) -> list[np.ndarray]:
    """Tokens to train on, by document, for the files of a domain.

    The last share of all their tokens is held out, beginning with the last file.
    """
    left = int(sum(int(file.starts[-1]) for file in files) * share)
    found: list[np.ndarray] = []
    for file in reversed(files):
        size = int(file.starts[-1])
        part = Fraction(min(left, size), size)
        found.append(last_share(file, part))
        left -= min(left, size)
    return found[::-1]


# --- reading one file


def _open(sides: list[tuple[Path, list[NamedFile]]], reading: _Reading,
          indexes: TokenIndexes) -> list[list[tuple[str, TokenFile]]]:
    """Domain and open file of the files of each side."""
    files = indexes.open([FileRequest(folder / one.path) for folder, named in sides for one in named],
                         settings=["memmap", reading.dtype, reading.end_id], vocab_size=reading.vocab_size,
                         read=lambda path, report: _read(path, reading, report))
    rest = iter(files)
    return [[(one.domain, next(rest)) for one in named] for _, named in sides]


def _read(path: Path, reading: _Reading, report: Report) -> TokenIndex:
    """Read a file whole and make its index."""
    try:
        found = token_format(path)
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            dtype = found.dtype or _width(file, status.st_size, reading)
            fitting = (status.st_size - found.start) // dtype.itemsize
            tokens = fitting if found.tokens is None else found.tokens
            _check_size(path, status.st_size, found.start + tokens * dtype.itemsize, tokens, dtype,
                        found.name)
            starts = _Starts(reading.end_id)
            other = "uint16" if dtype.itemsize == 4 else "uint32"
            advice = f"; data.dtype={other} where they are not {dtype.name}" if found.dtype is None else ""
            checksums = read_once(file, path, start=found.start, tokens=tokens, dtype=dtype,
                                  vocab_size=reading.vocab_size, visit=starts.look, report=report,
                                  advice=advice)
    except NotTokensError as error:
        raise DataError(161, "a file holds no token ids", where=str(path), why=shown(error.what, 200),
                        next=error.next) from error
    except OSError as error:
        raise DataError(162, "a token file cannot be read", where=str(path), why=reason(error),
                        next="data.path=<a .bin or .npy of token ids, or a folder of them>") from error
    return TokenIndex(found.shown(path), found.start, dtype, checksums, starts.of(tokens),
                      starts.ending(tokens))


class _Starts:
    """Document starts: the first token, and the one behind every end token."""

    def __init__(self, end_id: int | None) -> None:
        self._end_id, self._found = end_id, [np.zeros(1, np.int64)]

    def look(self, begin: int, block: np.ndarray) -> None:
        if self._end_id is not None:
            self._found.append(begin + 1 + np.flatnonzero(block == self._end_id))

    def of(self, tokens: int) -> np.ndarray:
        starts = np.concatenate(self._found)
        return np.append(starts[starts < tokens], tokens)

    def ending(self, tokens: int) -> Ending | None:
        """How documents end.

        All of them end in the end token, except the last one of a file that does not.
        """
        if self._end_id is None:
            return None
        found = np.concatenate(self._found)
        documents, closed = int((found < tokens).sum()), len(found) - 1
        return Ending(self._end_id, closed / documents, 0)


def _width(file: BinaryIO, size: int, reading: _Reading) -> np.dtype:
    """Type of raw ids.

    They are taken for four bytes wide if all that are looked at are inside the vocabulary. Pairs of two-byte
    ids read as one number are not: the second id would have to be 0 every time, or 1 in a vocabulary above
    65,536.
    """
    if reading.dtype != "auto":
        return np.dtype(f"<u{np.dtype(reading.dtype).itemsize}")
    head = np.frombuffer(os.pread(file.fileno(), min(size, _WIDTH_HEAD) // 4 * 4, 0), "<u4")
    return np.dtype("<u4" if size % 4 == 0 and len(head) and int(head.max()) < reading.vocab_size else "<u2")


def _check_size(path: Path, size: int, expected: int, tokens: int, dtype: np.dtype, name: str) -> None:
    if tokens and size == expected:
        return
    why = f"{size:,} bytes instead of {expected:,} for {tokens:,} ids ({dtype.name}, {name})"
    raise DataError(162, "a token file cannot be read", where=str(path),
                    why=why if tokens else "it holds no id",
                    next="copy it again, or leave it out of data.path")


def _check_end(files: list[TokenFile], reading: _Reading, typed: bool) -> None:
    """Check that the end token occurs in the tokens. If it does not, every file is one document."""
    if reading.end_id is None or any(file.index.ending and file.index.ending.share for file in files):
        return
    why = f"id {reading.end_id} does not occur in {sum(int(file.starts[-1]) for file in files):,} tokens"
    if typed:
        raise DataError(163, "the end token does not fit the data", where=f"data.end_token={reading.end_id}",
                        why=why, next="data.end_token=<the id that closes a document>; without one a file "
                                      "is a document")
    log.warning("the end token of data.tokenizer is not in the data: %s; every file is one document", why)


# --- the log


def _log_files(files: MemmapFiles, heldout: MemmapFiles, read: list[tuple[str, TokenFile]],
              opened: TokenFiles) -> None:
    documents = sum(len(file.starts) - 1 for _, file in read)
    held = names_text([one.path for one in heldout.heldout]) or "the end of each domain"
    log.info("%d token files of %s: %s tokens in %s documents; %s held out: %s", len(read),
             f"{len(opened.domains)} domain{'s' * (len(opened.domains) > 1)}",
             f"{opened.train.size + opened.heldout.size:,}", f"{documents:,}", f"{opened.heldout.size:,}",
             held)

"""The account of pre-tokenized data: which files are at its paths, and what becomes of each.

The ledgers are those of `account/ledgers.py`. The code that opens the files enters which are read and which
are left alone. Everything else at a path is left out, by what it is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moetrain.data.account.ledgers import (
    EMPTY,
    HELD,
    HIDDEN,
    OWN,
    TEST,
    TRAINED,
    VALID,
    FileEntry,
    FileLedger,
)
from moetrain.data.corpus.given_splits import VALID as VALID_SPLIT
from moetrain.data.pretokenized.token_files import Member
from moetrain.data.tokens.formats import NotTokensError, token_format
from moetrain.data.tokens.index_file import MAGIC, SUFFIX
from moetrain.files import open_regular

NO_TOKENS = "no token file"


@dataclass(slots=True)
class TokenEntry(FileEntry):
    """A file of tokens in the ledger, or another file that lies beside them.

    Args:
        domain: its domain.
        tokens: number of its tokens.
        heldout: how many of them are held out.
        end_id: id that most of its documents end in; None if that was not looked at.
        end_share: share of the documents that end in it.
    """

    domain: str = ""
    tokens: int = 0
    heldout: int = 0
    end_id: int | None = None
    end_share: float | None = None


class TokenAccount:
    """Ledgers of data.path, and of data.held_out where it is given."""

    def __init__(self) -> None:
        self.ledgers: list[FileLedger] = []
        self._entries: dict[Path, TokenEntry] = {}

    def add(self, key: str, path: str, *, read: Iterable[tuple[Path, str]],
            alone: Iterable[tuple[Path, str]] = ()) -> None:
        """Enter the files at the path of a key.

        Args:
            key: data.path or data.held_out.
            path: its value; if it is a folder, all files in it are entered.
            read: files that are read, and the side of each.
            alone: files that are left alone, and why.
        """
        ledger, folder, known = FileLedger(key, path), Path(path), set()
        for file, side, reason in [*((file, side, "") for file, side in read),
                                   *((file, TRAINED, why) for file, why in alone)]:
            below = file.is_relative_to(folder) and file != folder
            name = str(file.relative_to(folder)) if below else file.name
            entry = self._entries[file] = TokenEntry(name, file.stat().st_size, side, reason)
            ledger.entries.append(entry)
            known.add(file)
        if folder.is_dir():
            ledger.entries += _others(folder, known)
        self.ledgers.append(ledger)

    def note(self, path: Path, format: str) -> TokenEntry:
        """Set the format of a file that is read, and return its entry."""
        entry = self._entries[path]
        entry.format = format
        return entry

    def fill_in(self, members: Iterable[Member], domains: tuple[str, ...]) -> None:
        """Fill in tokens, documents and end token of the files that were opened."""
        for domain, file, trained in members:
            entry = self.note(file.tokens.path, f"{file.index.format}, {file.index.dtype.name}")
            entry.domain = domains[domain]
            entry.documents, entry.tokens = file.index.documents, file.index.tokens
            entry.heldout = entry.tokens - int(trained.sum())
            entry.side = HELD if entry.heldout == entry.tokens else TRAINED
            if file.index.ending is not None:
                entry.end_id, entry.end_share = file.index.ending.id, file.index.ending.share


def split_reason(split: str) -> str:
    """Reason for leaving a file of a split alone."""
    return VALID if split == VALID_SPLIT else TEST


def _others(folder: Path, known: set[Path]) -> Iterator[TokenEntry]:
    for file in sorted(folder.rglob("*")):
        if file not in known and file.is_file():
            entry = TokenEntry(str(file.relative_to(folder)), file.stat().st_size)
            _recognize(entry, file)
            yield entry


def _recognize(entry: TokenEntry, file: Path) -> None:
    """Find the reason for leaving a file out."""
    if any(part.startswith(".") for part in Path(entry.name).parts):
        entry.leave_out(HIDDEN)
    elif not entry.size:
        entry.leave_out(EMPTY)
    else:
        try:
            if file.suffix == SUFFIX and _begins(file) == MAGIC:
                entry.leave_out(OWN)
            else:
                token_format(file)
                entry.leave_out(NO_TOKENS)
        except NotTokensError as error:
            what = error.what.removeprefix("it is ").removeprefix("it holds ").partition(", ")[0]
            entry.leave_out(NO_TOKENS, format=what, convert=error.next)
        except OSError as error:
            entry.leave_out(NO_TOKENS, format=str(error))


def _begins(file: Path) -> bytes:
    with open_regular(file) as opened:
        return opened.read(len(MAGIC))

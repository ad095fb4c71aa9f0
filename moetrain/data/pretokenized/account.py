"""What lies at the paths of data that is tokens already, and what becomes of each file: the ledgers of data/account/ledgers.py.

Who opens the files says which are read and which are left alone; everything else that lies there is left out, by what it is.
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
    """A file of tokens. heldout: of its tokens, those that are held out. end_share: of its documents, those that end in the id
    that most of them end in, which is `end_id`; None where nobody has looked."""

    domain: str = ""
    tokens: int = 0
    heldout: int = 0
    end_id: int | None = None
    end_share: float | None = None


class TokenAccount:
    """ledgers: of data.path, and of data.held_out where it is given."""

    def __init__(self) -> None:
        self.ledgers: list[FileLedger] = []
        self._entries: dict[Path, TokenEntry] = {}

    def add(self, key: str, path: str, *, read: Iterable[tuple[Path, str]],
            alone: Iterable[tuple[Path, str]] = ()) -> None:
        """The files at the path of a key.

        Args:
            key: data.path or data.held_out.
            path: as it was typed; of a folder, all that lies in it.
            read: files, and the side that each is on.
            alone: files that are left alone, and why.
        """
        ledger, folder, known = FileLedger(key, path), Path(path), set()
        for file, side, reason in [*((file, side, "") for file, side in read),
                                   *((file, TRAINED, why) for file, why in alone)]:
            name = str(file.relative_to(folder)) if file.is_relative_to(folder) and file != folder else file.name
            entry = self._entries[file] = TokenEntry(name, file.stat().st_size, side, reason)
            ledger.entries.append(entry)
            known.add(file)
        if folder.is_dir():
            ledger.entries += _others(folder, known)
        self.ledgers.append(ledger)

    def note(self, path: Path, format: str) -> TokenEntry:
        """The entry of a file that is read."""
        entry = self._entries[path]
        entry.format = format
        return entry

    def fill_in(self, members: Iterable[Member], domains: tuple[str, ...]) -> None:
        """What the files hold."""
        for domain, file, trained in members:
            entry = self.note(file.tokens.path, f"{file.index.format}, {file.index.dtype.name}")
            entry.domain, entry.documents, entry.tokens = domains[domain], file.index.documents, file.index.tokens
            entry.heldout = entry.tokens - int(trained.sum())
            entry.side = HELD if entry.heldout == entry.tokens else TRAINED
            if file.index.ending is not None:
                entry.end_id, entry.end_share = file.index.ending.id, file.index.ending.share


def split_reason(split: str) -> str:
    """Why a file of a split is left alone."""
    return VALID if split == VALID_SPLIT else TEST


def _others(folder: Path, known: set[Path]) -> Iterator[TokenEntry]:
    for file in sorted(folder.rglob("*")):
        if file not in known and file.is_file():
            entry = TokenEntry(str(file.relative_to(folder)), file.stat().st_size)
            _recognize(entry, file)
            yield entry


def _recognize(entry: TokenEntry, file: Path) -> None:
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

"""Scan of a path: every file below it, and which of them are read. Only moetrain's own files are opened.

Links are followed, each folder once. Left out are hidden files and folders, moetrain's own output, empty
files, entries that are no regular file, the folder of `data.held_out`, and a test split beside the training
text. Each of them is in the ledger; a folder that is left out is walked for its size.
"""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moetrain.data.account.ledgers import (
    EMPTY,
    HELD,
    HELD_OUT,
    HIDDEN,
    NO_FILE,
    OWN,
    TEST,
    VALID,
    FileEntry,
    FileLedger,
)
from moetrain.data.corpus.given_splits import TEST as TEST_ROLE, TRAIN, Member, find_splits, unpaired
from moetrain.data.corpus.own_output import is_own, own_parts
from moetrain.errors import DataError
from moetrain.files import reason as said, shown

log = logging.getLogger(__name__)


class SourceFile(NamedTuple):
    """A file that is read. There may be a million of them, so the record repeats nothing of its ledger entry.

    Args:
        folder: the path that the user gave, or the folder of the file that the path names.
        entry: row of the ledger.
        mtime_ns: modification time.
        ctime_ns: change time, which moves with every write, whatever the modification time is set to.
        label: name without the parts that say a split; the domain is derived from it.
    """

    folder: str
    entry: FileEntry
    mtime_ns: int
    ctime_ns: int
    label: str

    @property
    def path(self) -> Path:
        return Path(self.folder, self.entry.name)


class Scan(NamedTuple):
    """Files found at a path.

    Args:
        ledger: every file, read or left out.
        files: files that are read, sorted by name. Those whose entry is on side `HELD` are a validation
            split.
    """

    ledger: FileLedger
    files: list[SourceFile]

    def side(self, side: str) -> list[SourceFile]:
        """Files on one side, TRAINED or HELD."""
        return [file for file in self.files if file.entry.side == side]


class _Found(NamedTuple):
    """One file of the walk.

    Args:
        name: relative to the path that the user gave.
        size: bytes on disk.
        mtime_ns: modification time.
        ctime_ns: change time.
        reason: why it is left out; empty if it is read.
    """

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    reason: str


_Identity = tuple[int, int]
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)       # what stat raises for a broken link


def scan(path: Path, *, key: str = "data.path", own: tuple[Path, ...] = (), held_out: Path | None = None,
         splits: bool = True) -> Scan:
    """Find every file at or below a path.

    Args:
        path: file or folder.
        key: config key that names it.
        own: files and folders to leave out as own output, whether or not they can be recognized yet.
        held_out: file or folder below it that `data.held_out` reads.
        splits: whether a split that is found is used; otherwise all of it is one text.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            places = {OWN: own, HELD_OUT: (held_out,) if held_out else ()}
            named = {_identity(place.stat()): reason for reason, group in places.items()
                     for place in group if place.exists()}
            named.pop(_identity(status), None)
            folder = path.resolve()
            found = sorted(_Walk(folder, named).files(), key=lambda file: file.name)
        else:
            folder, splits = path.parent, False
            found = [_found(path.name, status, "" if status.st_size else EMPTY)]
    except OSError as error:
        raise unreadable(Path(error.filename or path), error, key) from error
    return _sorted_out(FileLedger(key, str(path)), str(folder), found, splits, held_out is not None)


def unreadable(path: Path, error: OSError, key: str) -> DataError:
    """The error for a file or folder that cannot be read."""
    otherwise = ", or data.path=null for the built-in corpus" if key == "data.path" else ""
    return DataError(30, "the text cannot be read", where=f"{path} ({key})", why=said(error),
                     next=f"{key}=<file or folder of text>{otherwise}")


def _sorted_out(ledger: FileLedger, folder: str, found: list[_Found], splits: bool, held_out: bool) -> Scan:
    """Enter every file in the ledger, and assign the sides of a split."""
    members: dict[str, Member] = {}
    if splits:
        # The text of data.held_out counts: `train` is left out of the label of train/ beside it, too.
        candidates = [file.name for file in found if file.reason in ("", HELD_OUT)]
        members = find_splits(candidates)
        if alone := unpaired(candidates, members):
            log.warning("%s is read as any other text, though its name says validation or test%s: no name "
                        "beside it says training in the same way. data.held_out= names held-out text",
                        shown(alone[0]),
                        f" (as do those of {len(alone) - 1} more)" if len(alone) > 1 else "")
    files = []
    for name, size, mtime_ns, ctime_ns, reason in found:
        member = members.get(name)
        in_split = member is not None and not reason
        if in_split and member.role == TEST_ROLE:
            reason = TEST
        elif in_split and member.role != TRAIN and held_out:
            reason = VALID
        entry = ledger.add(name, size, reason)
        if in_split:
            ledger.splits.setdefault(member.role, []).append(entry)
        if not reason:
            if member is not None and member.role != TRAIN:
                entry.side = HELD
            files.append(SourceFile(folder, entry, mtime_ns, ctime_ns, member.label if member else name))
    return Scan(ledger, files)


class _Walk:
    """Walk of a folder that follows links.

    Args:
        root: the folder, resolved.
        named: reasons for leaving out files and folders that the config names, by identity.
    """

    def __init__(self, root: Path, named: dict[_Identity, str]) -> None:
        self._root, self._named = root, named
        self._prefix = len(str(root).rstrip("/")) + 1        # length of what relative names omit
        self._visited: set[_Identity] = set()
        self._aside: list[tuple[str, str]] = []              # folders left out, with the reason

    def files(self) -> Iterator[_Found]:
        """Yield every file.

        Folders that are left out come last: if a link leads into one, its files are read by that way and
        counted once.
        """
        for folder, folders, names in os.walk(self._root, followlinks=True, onerror=_refuse):
            here = _identity(os.stat(folder))
            if here in self._visited:
                folders.clear()
                continue
            if reason := self._why_not(folder, here, folders, names):
                self._aside.append((folder, reason))
                folders.clear()
                continue
            self._visited.add(here)
            own_folders, own_files = own_parts(folder, folders, names)
            self._aside += [(os.path.join(folder, name), OWN) for name in sorted(own_folders)]
            folders[:] = sorted(name for name in folders if name not in own_folders)
            for name in names:
                yield self._file(folder, name, OWN if name in own_files else "")
        for folder, reason in self._aside:
            yield from self._all_of(folder, reason)

    def _why_not(self, folder: str, here: _Identity, folders: list[str], names: list[str]) -> str:
        """Reason for leaving a folder out; empty if it is read."""
        if folder == str(self._root):
            return ""
        if here in self._named:
            return self._named[here]
        if is_own(folder, folders, names):
            return OWN
        return HIDDEN if os.path.basename(folder).startswith(".") else ""

    def _all_of(self, top: str, reason: str) -> Iterator[_Found]:
        """Yield every file of a folder that is left out, for its size."""
        for folder, folders, names in os.walk(top):          # an unreadable folder was not to be read anyway
            here = _identity(os.stat(folder))
            if here in self._visited:
                folders.clear()
                continue
            self._visited.add(here)
            for name in names:
                yield self._file(folder, name, reason)

    def _file(self, folder: str, name: str, reason: str) -> _Found:
        path = f"{folder}/{name}"
        relative = path[self._prefix:]
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno not in _NOWHERE and not reason:
                raise
            return _Found(relative, 0, 0, 0, reason or NO_FILE)
        if not stat.S_ISREG(status.st_mode):
            return _Found(relative, 0, 0, 0, NO_FILE)
        reason = self._named.get(_identity(status), "") or reason or (HIDDEN if name.startswith(".") else "")
        return _found(relative, status, reason or ("" if status.st_size else EMPTY))


def _found(name: str, status: os.stat_result, reason: str) -> _Found:
    return _Found(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, reason)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> None:
    raise error

"""Search for the token files that `data=memmap` reads, by name, below data.path and data.held_out."""

import glob
import logging
import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from moetrain.data.account.ledgers import HELD, HELD_OUT, TRAINED
from moetrain.data.corpus.given_splits import TEST, TRAIN, VALID
from moetrain.data.pretokenized.account import TokenAccount, split_reason
from moetrain.data.pretokenized.file_names import NamedFile, by_name
from moetrain.data.tokens.formats import SUFFIXES
from moetrain.errors import DataError
from moetrain.files import shown

_MOST_NAMED = 5                      # files named in one line of the log

log = logging.getLogger(__name__)


class MemmapFiles(NamedTuple):
    """Files below a folder, by their use.

    Args:
        folder: the folder to which the names are relative.
        train: files to train on.
        heldout: held-out files.
        test: files of a test split, which are left alone.
        left: files that are no token files.
        taken: files that data.held_out reads.
    """

    folder: Path
    train: list[NamedFile]
    heldout: list[NamedFile]
    test: list[NamedFile]
    left: list[PurePosixPath]
    taken: tuple[NamedFile, ...] = ()


def find_files(path: str, held_out: str | None, *, merge: bool) -> tuple[MemmapFiles, MemmapFiles]:
    """Find the files to train on and to hold out.

    Args:
        path: value of data.path.
        held_out: value of data.held_out.
        merge: whether to ignore a split that is found.

    Returns:
        Files of data.path, and files of data.held_out, which are the same if that is not given.
    """
    files = _find(path, "data.path", merge=merge, apart=None if held_out is None else TRAIN)
    heldout = files
    if held_out is not None:
        heldout = _find(held_out, "data.held_out", merge=True, apart=VALID)
        taken = {os.path.realpath(heldout.folder / one.path) for one in heldout.heldout}

        def others(named: list[NamedFile]) -> list[NamedFile]:
            return [one for one in named if os.path.realpath(files.folder / one.path) not in taken]

        every = files.train + files.test + files.heldout
        own = tuple(one for one in every if one not in others(every))
        files = files._replace(train=others(files.train), test=others(files.test + files.heldout), taken=own)
        if not files.train:
            raise _missing(path, "data.path", "data.held_out takes all of it")
        _log_left_out(heldout)
    _log_left_out(files)
    return files, heldout


def _find(path: str, key: str, *, merge: bool, apart: str | None) -> MemmapFiles:
    """The files that a key names, by their use.

    Args:
        path: its value.
        key: its name.
        merge: whether to ignore a split that is found.
        apart: split of the files where the other one lies elsewhere, as in `by_name`.
    """
    given, left = Path(path), []
    if given.is_dir():
        folder = given
        every = [PurePosixPath(file.relative_to(given))
                 for file in sorted(given.rglob("*")) if file.is_file()]
        visible = [file for file in every if not any(part.startswith(".") for part in file.parts)]
        chosen = by_name((file for file in visible if file.suffix in SUFFIXES), merge=merge, apart=apart)
        left = [file for file in visible if file.suffix not in SUFFIXES]
    else:
        named = [given]
        if not given.exists():
            named = [Path(name) for name in sorted(glob.glob(path)) if os.path.isfile(name)]
        folder = named[0].parent if named else given.parent
        if any(file.parent != folder for file in named):
            raise _missing(path, key,
                           "the pattern names files of several folders; give the folder above them")
        chosen = _with_siblings(folder, {PurePosixPath(file.name) for file in named}, merge=merge,
                                apart=apart)
    by_split = {split: [one for one in chosen if one.split == split] for split in (TRAIN, VALID, TEST)}
    if not by_split[VALID if apart == VALID else TRAIN]:
        named = " or ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise _missing(path, key, f"it holds no file named {named}" if os.path.exists(path)
                       else "it is not there")
    return MemmapFiles(folder, by_split[TRAIN], by_split[VALID], by_split[TEST], left)


def _with_siblings(folder: Path, names: set[PurePosixPath], *, merge: bool,
                   apart: str | None) -> list[NamedFile]:
    """Files that were named, with the held-out files of their domains that lie beside them."""
    if apart or merge or not names:
        return [one._replace(split=apart or TRAIN) for one in by_name(names, merge=True, apart=apart)]
    suffixes = {name.suffix for name in names}
    beside = {PurePosixPath(file.name) for file in folder.iterdir()
              if file.suffix in suffixes and file.is_file()}
    every = by_name(names | beside)
    trained = [one for one in every if one.path in names and one.split == TRAIN]
    if len(trained) < len(names):                            # val.bin itself was named: it is trained on
        return [one._replace(split=TRAIN) for one in every if one.path in names]
    domains = {one.domain for one in trained}
    return trained + [one for one in every if one.split == VALID and one.domain in domains]


def _missing(path: str, key: str, why: str) -> DataError:
    return DataError(160, "there are no token files", where=f"{path} ({key})", why=why,
                     next=f"{key}=<a .bin or .npy of token ids, or a folder of them>")


def enter_files(account: TokenAccount, path: str, held_out: str | None, files: MemmapFiles,
                 heldout: MemmapFiles) -> None:
    """Enter every file in the account.

    Args:
        account: the account.
        path: value of data.path.
        held_out: value of data.held_out.
        files: files of data.path.
        heldout: files of data.held_out.
    """
    sides = [(files.train, TRAINED), *([(files.heldout, HELD)] if held_out is None else [])]
    account.add("data.path", path, read=[(files.folder / one.path, side) for named, side in sides
                                         for one in named],
                alone=[*((files.folder / one.path, split_reason(one.split)) for one in files.test),
                       *((files.folder / one.path, HELD_OUT) for one in files.taken)])
    if held_out is not None:
        account.add("data.held_out", held_out,
                    read=[(heldout.folder / one.path, HELD) for one in heldout.heldout])


def _log_left_out(files: MemmapFiles) -> None:
    """Log which files are left out or left alone."""
    if files.left:
        size = sum((files.folder / path).stat().st_size for path in files.left)
        log.info("left out %d files that are no token files (%s bytes): %s", len(files.left), f"{size:,}",
                 names_text(files.left))
    if files.test:
        log.info("left alone, as a test set is: %s", names_text([one.path for one in files.test]))


def names_text(paths: list[PurePosixPath]) -> str:
    """Names of files in one line, the first few of them."""
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return shown(", ".join(str(path) for path in paths[:_MOST_NAMED])) + more

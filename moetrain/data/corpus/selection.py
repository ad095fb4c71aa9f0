"""Selection of documents: found, read, deduplicated and split, with an account of all that is not used.

`find_source` scans the paths, `select` reads them. Nothing is written, so `moetrain data inspect` reports
what `prepare` would do.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.config.schema import DataConfig
from moetrain.data.account.ledgers import (
    ALSO_HELD_OUT,
    CAPPED,
    CUT,
    DUPLICATES,
    HELD,
    OWN,
    TRAINED,
    Account,
    FileLedger,
    left_out_by_mistake,
)
from moetrain.data.account.text import reasons
from moetrain.data.corpus import builtin as corpus
from moetrain.data.corpus.scan import Scan, SourceFile, scan
from moetrain.data.corpus.sources import documents
from moetrain.data.corpus.split import FEW, LEAST_CUT, Split, cap_domains, split, unique, without
from moetrain.data.reading.documents import Document, Documents, Parts, spooled_document
from moetrain.data.reading.records import Reading
from moetrain.data.reading.spool import Spool
from moetrain.errors import CONTINUED, DataError

log = logging.getLogger(__name__)

# (what is done: "reading", "tokenizing"; bytes done; bytes in all)
Progress = Callable[[str, int, int], None]

BUILTIN = "the built-in corpus"
_MOST_NAMED = 3                              # reasons listed in an error
_MANY_DOMAINS = 50                           # with so many, check whether they are kinds of text
_HOST = re.compile(r"(https?://)?([\w-]+\.)+[a-z]{2,}(:\d+)?(/|$)", re.IGNORECASE)


class Source(NamedTuple):
    """Where text comes from.

    Args:
        name: the path as the user gave it, or BUILTIN.
        path: scan of the path; None for the built-in corpus.
        held_out: scan of `data.held_out`; None for a validation split or a share of the text.
    """

    name: str
    path: Scan | None
    held_out: Scan | None

    def refreshed(self, account: dict[str, Any]) -> dict[str, Any]:
        """The kept account of a source whose listing has not changed, with files left out as they are now."""
        found = {scan.ledger.key: scan.ledger for scan in (self.path, self.held_out) if scan}
        return {**account, "files": {key: found[key].refreshed(kept) if key in found else kept
                                     for key, kept in account["files"].items()}}

    def listing(self) -> Iterator[Any]:
        """Yield values that stay equal as long as nothing that is read has changed."""
        yield corpus.identity() if self.path is None else None
        for found in (self.path, self.held_out):
            if found:
                yield found.ledger.path, len(found.files)
                yield from map(_identity, found.files)


class Selection(NamedTuple):
    """Documents chosen from a source.

    Args:
        parts: what is trained on and what is held out.
        chosen: documents to train on or to split.
        heldout: documents that are held out whole.
        account: what became of everything else.
        rest: fate in the account's text ledger that receives the bytes by which cuts move.
    """

    parts: Split
    chosen: Parts
    heldout: Parts
    account: Account
    rest: str

    def record(self, counts: dict[str, dict[str, int]]) -> dict[str, Any]:
        """The account as `dataset.json` keeps it. `counts`: documents and bytes written, by split."""
        self.account.settle(counts["train"], counts["heldout"], self.rest)
        return self.account.record()


def find_source(path: str | None, held_out: str | None, *, own: tuple[Path, ...] = (),
                splits: bool = True) -> Source:
    """Scan everything that may be read, before any of it is.

    Args:
        path: file or folder of text; None for the built-in corpus.
        held_out: file or folder of held-out text; None for the validation split of the text, or a share of
            it.
        own: files and folders below them that are own output.
        splits: whether a split that is found is used.
    """
    heldout = None
    if held_out is not None:
        heldout = scan(Path(held_out), key="data.held_out", own=own, splits=False)
        _refuse_empty(heldout)
        for file in heldout.files:
            file.entry.side = HELD
    if path is None:
        return Source(BUILTIN, None, heldout)
    found = scan(Path(path), own=own, held_out=Path(held_out) if held_out else None, splits=splits)
    _refuse_empty(found)
    return Source(path, found, heldout)


def select(source: Source, spool: Spool, *, share: Fraction, reading: Reading = Reading(),
           domain_cap: int | None = None, allow_left_out: float = DataConfig.allow_left_out,
           progress: Progress | None = None,
           watch: Callable[[Document], None] = lambda document: None) -> Selection:
    """Read a source, deduplicate it and split it.

    Args:
        source: what `find_source` found; its ledgers are filled in.
        spool: keeps texts that cannot be read again from their files.
        share: share of the text to hold out where no held-out text is given.
        reading: how files are read.
        domain_cap: bytes of text to take from a domain at most; None takes all.
        allow_left_out: share of the bytes that may be left out by mistake.
        progress: called as bytes are read.
        watch: called with every document as it is read.
    """
    account = Account([found.ledger for found in (source.path, source.held_out) if found])
    found = unique(_kept(_read_all(source, account, spool, reading, domain_cap, progress), spool, watch))
    heldout = unique(_kept(_read_heldout(source, spool, reading, progress), spool, watch))
    for ledger in account.files:
        if (error := left_out_error(ledger, allow_left_out)) is not None:
            raise error
    account.note(DUPLICATES, np.concatenate([dropped.sizes for _, dropped in (found, heldout)]))
    kept = _without_heldout(found[0], heldout[0], source, account)
    chosen = cap_domains(kept, domain_cap)
    account.note(CAPPED, _positive(_ends(kept) - _ends(chosen)))
    limit = corpus.HELDOUT_LIMIT if source.path is None and not heldout[0] else None
    parts = Split(chosen, heldout[0]) if heldout[0] else _split(chosen, source, share, limit)
    account.note(TRAINED, parts.train.sizes)
    account.note(HELD, parts.heldout.sizes)
    if not heldout[0]:
        account.note(CUT, _positive(_ends(chosen)[parts.heldout.rows] - parts.heldout.ends))
    _warn_of_domains(chosen)
    return Selection(parts, chosen, heldout[0], account,
                     CAPPED if domain_cap is not None and source.path else CUT)


def _identity(file: SourceFile) -> tuple[Any, ...]:
    """What shows that a file is the same as before."""
    return file.entry.name, file.entry.size, file.mtime_ns, file.ctime_ns, file.label, file.entry.side


def _kept(found: Iterable[Document], spool: Spool, watch: Callable[[Document], None]) -> Documents:
    """Collect documents into columns, handing each to `watch`."""
    documents = Documents(spool)
    for document in found:
        watch(document)
        documents.append(document)
    return documents


def _ends(parts: Parts) -> np.ndarray:
    """int64 [documents], where the part of each document ends; 0 for a document without a part."""
    ends = np.zeros(len(parts.documents), np.int64)
    ends[parts.rows] = parts.ends
    return ends


def _positive(sizes: np.ndarray) -> np.ndarray:
    return sizes[sizes > 0]


def _read_all(source: Source, account: Account, spool: Spool, reading: Reading, domain_cap: int | None,
              progress: Progress | None) -> Iterator[Document]:
    """Yield the documents of a corpus except its validation split."""
    if source.path is None:
        ledger = FileLedger("data.path", BUILTIN)
        account.files.insert(0, ledger)
        for name, text, domain in ((found.name, found.text, found.domain)
                                   for found in corpus.builtin_documents(domain_cap=domain_cap)):
            entry = ledger.add(name, len(text))
            entry.format, entry.documents, entry.text = "text", 1, len(text)
            yield spooled_document(domain, text, spool)
    else:
        files = source.path.side(TRAINED)
        some = False
        for document in documents(files, spool=spool, reading=reading,
                                  progress=progress and partial(progress, "reading")):
            some = True
            yield document
        if not some:
            raise _no_text(source.path, "every text is empty")


def _read_heldout(source: Source, spool: Spool, reading: Reading,
                  progress: Progress | None) -> Iterator[Document]:
    """Yield the held-out text that the user provides: `data.held_out`, or a validation split."""
    found = source.held_out or source.path
    files = source.held_out.files if source.held_out else source.path.side(HELD) if source.path else []
    if not found or not files:
        return
    some = False
    for document in documents(files, spool=spool, reading=reading, key=found.ledger.key,
                              progress=progress and partial(progress, "reading held-out text")):
        some = True
        yield document
    if not some:
        raise _no_text(found, "every text is empty" if source.held_out
                       else "every text of its validation split is empty")


def _without_heldout(found: Parts, heldout: Parts, source: Source, account: Account) -> Parts:
    kept, also = without(found, heldout)
    where = "data.held_out" if source.held_out else "the validation split"
    if not kept:
        raise DataError(104, "no text is left to train on", where=f"{source.name} (data.path), {where}",
                        why=f"every text of data.path is also in {where}, which is not trained on",
                        next="data.held_out=<a file or folder of other text>, or data.held_out=null to hold "
                             "out a share"
                        if source.held_out else "data.split=merge takes the text without its splits")
    if also:
        log.info("%d documents of %s are not trained on: %s has them too", len(also), source.name, where)
    account.note(ALSO_HELD_OUT, also.sizes)
    return kept


def _split(chosen: Parts, source: Source, share: Fraction, limit: int | None) -> Split:
    if share == 1:
        return Split(chosen.at(np.zeros(0, np.int64)), chosen)
    parts = split(chosen, share=share, heldout_limit=limit)
    if not parts.heldout:
        raise DataError(35, "there is too little text to hold some out", where=f"{source.name} (data.path)",
                        why=f"{len(chosen)} documents with {chosen.bytes:,} bytes; with fewer than {FEW} "
                            "documents one of them needs "
                            f"{-(-LEAST_CUT // share)} bytes, of which {float(share):g} are held out",
                        next="give more text: data.path=<file or folder>, or held-out text: "
                             "data.held_out=<file or folder>")
    return parts


def _refuse_empty(found: Scan) -> None:
    if any(file.entry.size for file in found.files if file.entry.side == TRAINED):
        return
    kept = found.ledger.record()["left_out"]
    own = [row for row in kept if row["reason"] == OWN]
    why = "no file below it has any content"
    if kept:
        why += f"; left out: {'; '.join(reasons(kept[:_MOST_NAMED]))}"
    only_own = own and own == kept
    tokens = "data=tokens data.path=<a folder that data=text has prepared>"
    raise _no_text(found, why, tokens if only_own else "")


def _no_text(found: Scan, why: str, other: str = "") -> DataError:
    key = found.ledger.key
    otherwise = other or ("data.path=null for the built-in corpus" if key == "data.path" else "")
    return DataError(32, "there is no text to read", where=f"{found.ledger.path} ({key})", why=why,
                     next=f"{key}=<file or folder of text>{otherwise and f', or {otherwise}'}")


def left_out_error(ledger: FileLedger, allowed: float) -> DataError | None:
    """The error if more of the bytes than allowed were left out by mistake, else None."""
    lost, total = left_out_by_mistake([ledger])
    if lost <= allowed * total:
        return None
    rows = reasons(ledger.mistakes(), examples=True)
    more = [f"and {len(rows) - _MOST_NAMED} more"] * (len(rows) > _MOST_NAMED)
    needed = min(1.0, -(-lost * 1000 // total) / 1000)
    return DataError(140, f"{lost / total:.0%} of the bytes would be left out",
                     where=f"{ledger.path} ({ledger.key})",
                     why=CONTINUED.join([f"{lost:,} of {total:,} bytes, more than "
                                         f"data.allow_left_out={allowed:g} allows:",
                                         *rows[:_MOST_NAMED], *more]),
                     next=f"convert them, move them away, or data.allow_left_out={needed:g} to go on "
                          "without them")


def _warn_of_domains(chosen: Parts) -> None:
    """Warn where domains look like host names or document ids.

    Losses are reported by domain, which needs a few kinds of text.
    """
    names = list(chosen.by_domain())
    if len(names) < _MANY_DOMAINS:
        return
    if 2 * sum(map(bool, map(_HOST.match, names))) > len(names):
        problem = "most look like the name of a host"
    elif len(chosen) < 2 * len(names):
        problem = "nearly every document has one of its own"
    else:
        return
    log.warning("%d domains for %d documents, and %s: data.domain_key=<key of a few kinds of text>, or "
                "data.domain_key=null for none, says what losses are told by",
                len(names), len(chosen), problem)

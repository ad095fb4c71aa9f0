"""Text to a prepared dataset: read, remove duplicates, split, tokenise, write. Once; the next run finds it.

    prepare(path=None, out=Path("data"), tokenizer="bytes")  ->  data/<fingerprint>/

The fingerprint is a hash of the tokenizer, of every (domain, content) and of how held-out text was chosen: it does not
depend on where files lie or in which order they come. The folder appears whole or not at all and is never overwritten;
one that is there is verified and used. `out/sources.json` remembers which source (paths, sizes, times of change) gave
which fingerprint, so that an unchanged source is not read again.

Reading is sources.py, the built-in texts corpus.py, the split split.py, the files prepared.py and tokens.py.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.config.schema import Config, DataConfig
from moetrain.data import corpus
from moetrain.data.overlap import Overlap
from moetrain.data.prepared import DESCRIPTION, Prepared, SplitWriter, lost_description, open_prepared, total, write_description
from moetrain.data.document import Document, text_document
from moetrain.data.sources import SourceFile, documents, scan
from moetrain.data.records import Reading
from moetrain.data.split import FEW, LEAST_CUT, Split, cap_domains, exact, split, unique, whole, without
from moetrain.data.spool import Spool
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.data.tokens import unwritable, write_file
from moetrain.errors import DataError, DiskError
from moetrain.files import read_json
from moetrain.locks import is_at, lock_folder

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]   # what is done ("reading", "tokenizing"), its bytes done, all of them

_FORMAT = "moetrain-dataset-1"
_NAME_LENGTH = 16                            # hexadecimal digits of the fingerprint in the folder's name
_STALE_S = 24 * 3600
_MOST_REMEMBERED = 16 << 20                  # bytes of sources.json: a hundred for each source
_SHARE = Fraction(1, 20)                     # of the text, held out; fingerprints name another one alone


class _Source(NamedTuple):
    """Where text comes from. key: equal as long as the source is unchanged."""

    key: str
    files: list[SourceFile] | None           # None: the built-in corpus
    name: str
    heldout: list[SourceFile] | None = None  # None: a share of the text


def prepare_from_config(config: Config, run_dir: Path, progress: Progress | None = None) -> Path:
    """The dataset folder of a run with data=text or data=tokens; prepared now when it is not there yet."""
    data = config.data
    assert data.kind in ("text", "tokens"), data.kind
    if data.kind == "tokens":
        return open_prepared(tokens_path(data.path), verify=False).folder
    out = Path(data.cache) if data.cache else run_dir / "data"
    return prepare(path=data.path, out=out, tokenizer=data.tokenizer, domain_cap=data.domain_cap, held_out=data.held_out,
                   held_out_share=data.held_out_share, overlap=data.overlap, progress=progress,
                   reading=Reading(data.text_key, data.domain_key, data.separator, data.encoding))


def tokens_path(path: str | None) -> Path:
    if not path:
        raise DataError(52, "data=tokens needs a folder of prepared tokens", where="data.path=null",
                        why="there are no built-in tokens", next="data.path=<folder>, or data=text to prepare text")
    return Path(path)


def prepare(*, path: str | None, out: Path, tokenizer: str, domain_cap: int | None = None, held_out: str | None = None,
            held_out_share: float = DataConfig.held_out_share, overlap: int = DataConfig.overlap,
            reading: Reading = Reading(), progress: Progress | None = None) -> Path:
    """The folder of the dataset that a source gives.

    Args:
        path: file or folder of text, None for the built-in corpus.
        out: where dataset folders lie, side by side.
        tokenizer: `bytes` or the path of a tokenizer.json.
        domain_cap: bytes of text to take from a domain at most; held-out text of the user's own is not cut.
        held_out: file or folder of held-out text; None holds out a share of the text.
        held_out_share: that share.
        overlap: windows of held-out text to look up in the training text at most; 0 for none.
        reading: how files are read: keys of records, separator, encoding.
        progress: called as bytes are read and written.
    """
    start = time.monotonic()
    encoder, share = load_tokenizer(tokenizer), _SHARE if held_out else exact(held_out_share)
    source = _source(path, held_out, out, [encoder.identity, domain_cap, reading, *_unusual(share)])
    known = _remembered(out).get(source.key)
    if known and _is_there(out / known):
        return _reuse(out / known)
    heldout_limit = corpus.HELDOUT_LIMIT if source.files is None and source.heldout is None else None
    with Spool(out) as spool:
        chosen, heldout = _choose(source, spool, domain_cap, reading, progress)
        parts = _split(chosen, heldout, source, share, heldout_limit)
        chooses = [_contents(heldout)] if heldout else _unusual(share)
        fingerprint = _hash([_FORMAT, encoder.identity, heldout_limit, _contents(chosen), *chooses])
        folder = out / fingerprint[:_NAME_LENGTH]
        if _is_there(folder):
            _reuse(folder)
        else:
            description = {"fingerprint": fingerprint, "tokenizer": encoder.identity, "vocab_size": encoder.vocab_size,
                           "end_id": encoder.end_id, "source_files": len(source.files or chosen)}
            _build(folder, parts, encoder, description, overlap, progress and partial(progress, "tokenizing"))
            _log(open_prepared(folder, verify=False), source, held_out, time.monotonic() - start)
    _remember(out, source.key, folder.name)
    return folder


def _is_there(folder: Path) -> bool:
    """Whether a dataset lies in its place; DataError where only a part of it does."""
    if os.path.exists(folder / DESCRIPTION):
        return True
    try:
        parts = os.path.isdir(folder) and any(folder.iterdir())
    except OSError as error:
        raise unwritable(folder, error) from error
    if parts:
        raise lost_description(folder)
    return False


def _unusual(share: Fraction) -> list[str]:
    """What of a share goes into a hash: datasets of the usual one keep the fingerprint that they always had."""
    return [] if share == _SHARE else [f"held out {share}"]


def _source(path: str | None, held_out: str | None, out: Path, settings: list[Any]) -> _Source:
    """Everything that may be read, before any of it is."""
    named, heldout, listed = [_FORMAT, *settings], None, []
    exclude = (out,) if held_out is None else (out, Path(held_out))
    if held_out is not None:
        heldout = _files(held_out, "data.held_out", (out,))
        listed = [str(Path(held_out).resolve()), _listing(heldout)]
    if path is None:
        return _Source(_hash([*named, corpus.identity(), *listed]), None, "the built-in corpus", heldout)
    files = _files(path, "data.path", exclude)
    return _Source(_hash([*named, str(Path(path).resolve()), _listing(files), *listed]), files, path, heldout)


def _files(path: str, key: str, exclude: tuple[Path, ...]) -> list[SourceFile]:
    files = scan(Path(path), exclude=exclude, key=key)
    if not any(file.size for file in files):
        raise _no_text(path, key, "no file below it has any content (hidden files are left out)")
    return files


def _listing(files: list[SourceFile]) -> list[tuple[str, int, int, int]]:
    return [(file.name, file.size, file.mtime_ns, file.ctime_ns) for file in files]


def _no_text(path: str, key: str, why: str) -> DataError:
    otherwise = ", or data.path=null for the built-in corpus" if key == "data.path" else ""
    return DataError(32, "there is no text to read", where=f"{path} ({key})", why=why,
                     next=f"{key}=<file or folder of text>{otherwise}")


def _choose(source: _Source, spool: Spool, domain_cap: int | None, reading: Reading,
            progress: Progress | None) -> tuple[list[Document], list[Document]]:
    """(documents to train on or to split, held-out documents of the user's own), unique and in order."""
    if source.files is None:
        found: Iterable[Document] = (text_document(document.domain, document.text)
                                     for document in corpus.builtin_documents(domain_cap=domain_cap))
    else:
        found = documents(source.files, spool=spool, reading=reading, progress=progress and partial(progress, "reading"))
    chosen = unique(found)
    if not chosen:
        raise _no_text(source.name, "data.path", "every text is empty")
    if source.heldout is None:
        return cap_domains(chosen, domain_cap), []
    heldout = unique(documents(source.heldout, spool=spool, reading=reading, key="data.held_out",
                               progress=progress and partial(progress, "reading held-out text")))
    if not heldout:
        raise _no_text("the held-out text", "data.held_out", "every text is empty")
    kept = without(chosen, heldout)
    if not kept:
        raise DataError(104, "no text is left to train on", where=f"{source.name} (data.path), data.held_out",
                        why="every text of data.path is also in data.held_out, which is not trained on",
                        next="data.held_out=<a file or folder of other text>, or data.held_out=null to hold out a share")
    if len(kept) < len(chosen):
        log.info("%d documents of %s are not trained on: data.held_out has them too", len(chosen) - len(kept), source.name)
    return cap_domains(kept, domain_cap), heldout


def _split(chosen: list[Document], heldout: list[Document], source: _Source, share: Fraction,
           heldout_limit: int | None) -> Split:
    if heldout:
        return whole(chosen, heldout)
    parts = split(chosen, share=share, heldout_limit=heldout_limit)
    if not parts.heldout:
        size = sum(document.size for document in chosen)
        raise DataError(35, "there is too little text to hold some out", where=f"{source.name} (data.path)",
                        why=f"{len(chosen)} documents with {size:,} bytes; with fewer than {FEW} documents one of them needs "
                            f"{-(-LEAST_CUT // share)} bytes, of which {float(share):g} are held out",
                        next="give more text: data.path=<file or folder>, or held-out text: data.held_out=<file or folder>")
    return parts


def _contents(chosen: list[Document]) -> list[tuple[str, str, int]]:
    return [(document.domain, document.digest.hex(), document.size) for document in chosen]


def _build(folder: Path, parts: Split, encoder: Tokenizer, description: dict[str, Any], overlap: int,
           progress: Callable[[int, int], None] | None) -> None:
    """Write the dataset in a temporary folder beside its place, then rename it there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        temporary, claim = _temporary(folder.parent)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    try:
        temporary.chmod(0o755)
        description = description | _write_parts(temporary, parts, encoder, overlap, progress)
        if encoder.content is not None:
            write_file(temporary / "tokenizer.json", encoder.content)
        write_description(temporary, description)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if claim is not None:
            os.close(claim)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if not _is_there(folder):
            raise unwritable(folder, error) from error
        _reuse(folder)                       # another process was faster; its dataset has the same content


def _write_parts(folder: Path, parts: Split, encoder: Tokenizer, overlap: int,
                 progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Held-out text first, so that the overlap is known in one pass over the training text."""
    domains = tuple(sorted({part.document.domain for part in parts.train + parts.heldout}))
    sizes = [sum(part.end - part.start for part in members) for members in (parts.heldout, parts.train)]
    measure = Overlap(heldout_bytes=sizes[0], limit=overlap) if overlap else None
    counts, done = {}, 0
    for name, members, note in (("heldout", parts.heldout, measure and measure.heldout),
                                ("train", parts.train, measure and measure.train)):
        writer = SplitWriter(folder=folder, split=name, vocab_size=encoder.vocab_size, domains=domains)
        for part in members:
            domain, size = domains.index(part.document.domain), 0
            for block in note(part.blocks()) if note else part.blocks():
                writer.extend(encoder.encode(block), domain)
                size += len(block)
                if progress:
                    progress(done + size, sum(sizes))
            writer.extend(np.array([encoder.end_id]), domain)
            writer.end_document(domain, size)
            done += part.end - part.start
        writer.flush()
        counts[name] = writer.counts
    if progress:
        progress(sum(sizes), sum(sizes))
    share = measure and measure.share()
    return {"domains": list(domains), "train": counts["train"], "heldout": counts["heldout"],
            "heldout_overlap": share.value if share else None,
            "overlap_windows": share.windows if share else 0, "overlap_every": share.every if share else 0}


def _reuse(folder: Path) -> Path:
    prepared = open_prepared(folder, verify=True)
    log.info("data %s: %s, prepared before", folder, _sizes(prepared))
    return folder


def _log(prepared: Prepared, source: _Source, held_out: str | None, seconds: float) -> None:
    described = prepared.description
    text = f"prepared {source.name} in {seconds:.1f} s: {_sizes(prepared)}"
    if held_out is not None:
        text += f" ({held_out})"
    if described["heldout_overlap"] is not None:
        text += f"; {100 * described['heldout_overlap']:.1f} % of held-out text also occurs in the training text"
    if described["overlap_every"] > 1:
        text += f" (an estimate: {described['overlap_windows']:,} places looked up, one in {described['overlap_every']})"
    log.info("%s", text)


def _sizes(prepared: Prepared) -> str:
    train, heldout = (total(prepared.description[split]) for split in ("train", "heldout"))
    return (f"{len(prepared.domains)} domains, {train['tokens']:,} tokens in {train['documents']:,} documents, "
            f"{heldout['tokens']:,} held out")


def _remembered(out: Path) -> dict[str, str]:
    """Source key -> folder name. It only saves time: whatever is wrong with it, the source is read again."""
    try:
        known = read_json(out / "sources.json", limit=_MOST_REMEMBERED)
    except (OSError, ValueError):
        return {}
    usable = isinstance(known, dict) and all(isinstance(name, str) and name.isalnum() for name in known.values())
    return known if usable else {}


def _remember(out: Path, key: str, name: str) -> None:
    try:
        write_file(out / "sources.json", json.dumps(_remembered(out) | {key: name}, indent=1).encode())
    except DiskError as error:
        log.warning("cannot remember what %s was made of: %s", name, error.why)


def _remove_stale(out: Path) -> None:
    """Remove folders that a killed preparation left behind: nobody holds them any more, or where folders cannot be locked, they are old."""
    for folder in out.glob(".preparing-*"):
        try:
            claim = lock_folder(folder)
        except OSError:
            with suppress(OSError):
                if time.time() - folder.lstat().st_mtime > _STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)
            continue
        if claim is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(claim)


def _temporary(out: Path) -> tuple[Path, int | None]:
    """A folder to write a dataset in, and the lock that says that somebody does; None where folders cannot be locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".preparing-", dir=out))
        try:
            claim = lock_folder(folder)
        except OSError:
            return folder, None
        if claim is not None and is_at(claim, folder):       # otherwise another preparation has found it unlocked and removes it
            return folder, claim
        if claim is not None:
            os.close(claim)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

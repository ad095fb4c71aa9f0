"""Text to a prepared dataset: read, remove duplicates, split, tokenise, write. Once; the next run finds it.

    prepare(path=None, out=Path("data"), tokenizer="bytes", domain_cap=None)  ->  data/<fingerprint>/

The fingerprint is a hash of the tokenizer and of every (domain, content): it does not depend on where files lie or in
which order they come. The folder appears whole or not at all and is never overwritten; one that is there is verified
and used. `out/sources.json` remembers which source (paths, sizes, times of change) gave which fingerprint, so that an
unchanged source is not read again.

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.config.schema import Config
from moetrain.data import corpus
from moetrain.data.prepared import DESCRIPTION, Prepared, SplitWriter, lost_description, open_prepared, total, write_description
from moetrain.data.sources import Document, SourceFile, documents, scan, text_document
from moetrain.data.split import HELDOUT_ONE_IN, MIN_TO_CUT, Overlap, Part, Split, cap_domains, split, unique
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.data.tokens import unwritable, write_file
from moetrain.errors import DataError, DiskError
from moetrain.files import read_json

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]        # bytes done, bytes in all

_FORMAT = "moetrain-dataset-1"
_NAME_LENGTH = 16                            # hexadecimal digits of the fingerprint in the folder's name
_STALE_S = 24 * 3600
_MOST_REMEMBERED = 16 << 20                  # bytes of sources.json: a hundred for each source


class _Source(NamedTuple):
    """Where text comes from. key: equal as long as the source is unchanged."""

    key: str
    files: list[SourceFile] | None           # None: the built-in corpus
    name: str


def prepare_from_config(config: Config, run_dir: Path) -> Path:
    """The dataset folder of a run with data=text or data=tokens; prepared now when it is not there yet."""
    data = config.data
    assert data.kind in ("text", "tokens"), data.kind
    if data.kind == "tokens":
        return open_prepared(tokens_path(data.path), verify=False).folder
    out = Path(data.cache) if data.cache else run_dir / "data"
    return prepare(path=data.path, out=out, tokenizer=data.tokenizer, domain_cap=data.domain_cap)


def tokens_path(path: str | None) -> Path:
    if not path:
        raise DataError(52, "data=tokens needs a folder of prepared tokens", where="data.path=null",
                        why="there are no built-in tokens", next="data.path=<folder>, or data=text to prepare text")
    return Path(path)


def prepare(*, path: str | None, out: Path, tokenizer: str, domain_cap: int | None,
            progress: Progress | None = None) -> Path:
    """The folder of the dataset that a source gives.

    path: file or folder of text, None for the built-in corpus. out: where dataset folders lie, side by side.
    tokenizer: `bytes` or the path of a tokenizer.json. domain_cap: bytes of text to take from a domain at most.
    """
    start = time.monotonic()
    encoder = load_tokenizer(tokenizer)
    source = _source(path, out, encoder, domain_cap)
    known = _remembered(out).get(source.key)
    if known and _is_there(out / known):
        return _reuse(out / known)
    reading, writing = _halves(progress)
    chosen = cap_domains(unique(_documents(source, domain_cap, reading)), domain_cap)
    heldout_limit = corpus.HELDOUT_LIMIT if source.files is None else None
    parts = _split(chosen, source, heldout_limit)
    fingerprint = _fingerprint(encoder, chosen, heldout_limit)
    folder = out / fingerprint[:_NAME_LENGTH]
    if _is_there(folder):
        _reuse(folder)
    else:
        description = {"fingerprint": fingerprint, "tokenizer": encoder.identity, "vocab_size": encoder.vocab_size,
                       "end_id": encoder.end_id, "source_files": len(source.files or chosen)}
        _build(folder, parts, encoder, description, writing)
        _log(open_prepared(folder, verify=False), source, time.monotonic() - start)
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


def _source(path: str | None, out: Path, encoder: Tokenizer, domain_cap: int | None) -> _Source:
    settings = [_FORMAT, encoder.identity, domain_cap]
    if path is None:
        return _Source(_hash(settings + [corpus.identity()]), None, "the built-in corpus")
    files = scan(Path(path), exclude=out)
    if not files or not any(file.size for file in files):
        raise DataError(32, "there is no text to read", where=f"{path} (data.path)",
                        why="no file below it has any content (hidden files are left out)",
                        next="data.path=<file or folder of text>, or data.path=null for the built-in corpus")
    listing = [(file.name, file.size, file.mtime_ns) for file in files]
    return _Source(_hash(settings + [str(Path(path).resolve()), listing]), files, path)


def _documents(source: _Source, domain_cap: int | None, progress: Progress | None) -> Iterable[Document]:
    if source.files is not None:
        return documents(source.files, progress=progress)
    return (text_document(document.domain, document.text)
            for document in corpus.builtin_documents(domain_cap=domain_cap))


def _split(chosen: list[Document], source: _Source, heldout_limit: int | None) -> Split:
    if not chosen:
        raise DataError(32, "there is no text to read", where=f"{source.name} (data.path)", why="every text is empty",
                        next="data.path=<file or folder of text>, or data.path=null for the built-in corpus")
    parts = split(chosen, heldout_limit=heldout_limit)
    if not parts.heldout:
        size = sum(document.size for document in chosen)
        raise DataError(35, "there is too little text to hold some out", where=f"{source.name} (data.path)",
                        why=f"{len(chosen)} documents with {size:,} bytes; with fewer than {HELDOUT_ONE_IN} documents "
                            f"one of them needs {MIN_TO_CUT} bytes", next="give more text: data.path=<file or folder>")
    return parts


def _fingerprint(encoder: Tokenizer, chosen: list[Document], heldout_limit: int | None) -> str:
    contents = [(document.domain, document.digest.hex(), document.size) for document in chosen]
    return _hash([_FORMAT, encoder.identity, heldout_limit, contents])


def _build(folder: Path, parts: Split, encoder: Tokenizer, description: dict[str, Any],
           progress: Progress | None) -> None:
    """Write the dataset in a temporary folder beside its place, then rename it there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".preparing-", dir=folder.parent))
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    try:
        temporary.chmod(0o755)
        description = description | _write_parts(temporary, parts, encoder, progress)
        if encoder.content is not None:
            write_file(temporary / "tokenizer.json", encoder.content)
        write_description(temporary, description)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if not _is_there(folder):
            raise unwritable(folder, error) from error
        _reuse(folder)                       # another process was faster; its dataset has the same content


def _write_parts(folder: Path, parts: Split, encoder: Tokenizer, progress: Progress | None) -> dict[str, Any]:
    """Held-out text first, so that the overlap is known in one pass over the training text."""
    domains = tuple(sorted({part.document.domain for part in parts.train + parts.heldout}))
    overlap = Overlap()
    size = sum(part.end - part.start for part in parts.train + parts.heldout)
    done, counts = 0, {}
    for name, members, note in (("heldout", parts.heldout, overlap.add_heldout),
                                ("train", parts.train, overlap.add_train)):
        writer = SplitWriter(folder=folder, split=name, vocab_size=encoder.vocab_size, domains=domains)
        for part in members:
            text = part.read()
            note(text)
            writer.add(np.append(encoder.encode(text), encoder.end_id), domains.index(part.document.domain), len(text))
            done += part.end - part.start
            if progress:
                progress(done, size)
        writer.flush()
        counts[name] = writer.counts
    return {"domains": list(domains), "train": counts["train"], "heldout": counts["heldout"],
            "heldout_overlap": overlap.share}


def _reuse(folder: Path) -> Path:
    prepared = open_prepared(folder, verify=True)
    log.info("data %s: %s, prepared before", folder, _sizes(prepared))
    return folder


def _log(prepared: Prepared, source: _Source, seconds: float) -> None:
    log.info("prepared %s in %.1f s: %s; %.1f %% of held-out text also occurs in the training text", source.name,
             seconds, _sizes(prepared), 100 * prepared.description["heldout_overlap"])


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
    """Folders that a killed preparation left behind."""
    for folder in out.glob(".preparing-*"):
        if time.time() - folder.stat().st_mtime > _STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def _halves(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """Two passes over the text as one progress from nothing to all."""
    if progress is None:
        return None, None
    return (lambda done, size: progress(done, 2 * size)), (lambda done, size: progress(size + done, 2 * size))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

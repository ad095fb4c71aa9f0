"""Text to a prepared dataset: read, remove duplicates, split, tokenise, write. Once; the next run finds it.

    prepare(path=None, out=Path("data"), tokenizer="bytes")  ->  data/<fingerprint>/

The fingerprint is a hash of the tokenizer, of every (domain, content) and of how held-out text was chosen: it does not
depend on where files lie or in which order they come. The folder appears whole or not at all and is never overwritten
(data/preparation/dataset_folder.py); one that is there is verified and used. `out/sources.json` remembers which source (paths, sizes, times of change) gave
which fingerprint and account, so that an unchanged source is not read again.

What is read, and on which side it is: data/corpus/selection.py. The files: data/preparation/prepared_dataset.py and data/tokens/shards.py.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from moetrain.config.schema import Config, DataConfig
from moetrain.data.account.text import account_lines, is_account
from moetrain.data.corpus import builtin as corpus
from moetrain.data.corpus.selection import BUILTIN, Progress, Selection, Source, find_source, select
from moetrain.data.corpus.split import exact
from moetrain.data.preparation.by_fingerprint import NAME_LENGTH, prepared_place
from moetrain.data.preparation.dataset_folder import unfinished
from moetrain.data.preparation.prepared_dataset import (
    DESCRIPTION,
    Prepared,
    lost_description,
    open_prepared,
    total,
    write_description,
)
from moetrain.data.preparation.token_writing import write_tokens
from moetrain.data.reading.documents import Parts
from moetrain.data.reading.records import Reading, reading_of
from moetrain.data.reading.spool import Spool
from moetrain.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from moetrain.data.tokens.shards import unwritable, write_file
from moetrain.errors import DataError, DiskError
from moetrain.files import read_json, shown

log = logging.getLogger(__name__)

_FORMAT = "moetrain-dataset-1"
_MOST_REMEMBERED = 16 << 20                  # bytes of sources.json: a few thousand for each source
_SHARE = Fraction(1, 20)                     # of the text, held out; fingerprints name another one alone


def prepare_from_config(config: Config, run_dir: Path, progress: Progress | None = None, *,
                        tokenizer: Tokenizer | None = None, expected: str | None = None,
                        remind: bool = True) -> Path:
    """The dataset folder of a run with data=text or data=tokens; prepared now when it is not there yet.

    tokenizer: in place of data.tokenizer. expected: the fingerprint that it has to have; nothing is written where it has another.
    remind: whether to say the account of data that is there, too.
    """
    data = config.data
    assert data.kind in ("text", "tokens"), data.kind
    if data.kind == "tokens":
        return open_prepared(tokens_path(data.path), verify=False).folder
    out = prepared_place(data, run_dir)
    return prepare(path=data.path, out=out, tokenizer=tokenizer or data.tokenizer, domain_cap=data.domain_cap,
                   held_out=data.held_out, held_out_share=data.held_out_share, overlap=data.overlap,
                   splits=data.split == "respect", allow_left_out=data.allow_left_out,
                   reading=reading_of(data), end_token=data.end_token,
                   parse_special=data.parse_special, run_dir=run_dir, expected=expected, remind=remind,
                   progress=progress)


def tokens_path(path: str | None) -> Path:
    if not path:
        raise DataError(52, "data=tokens needs a folder of prepared tokens", where="data.path=null",
                        why="there are no built-in tokens",
                        next="data.path=<folder>, or data=text to prepare text")
    return Path(path)


def prepare(*, path: str | None, out: Path, tokenizer: str | Tokenizer, domain_cap: int | None = None,
            held_out: str | None = None,
            held_out_share: float = DataConfig.held_out_share, overlap: int = DataConfig.overlap,
            splits: bool = True,
            allow_left_out: float = DataConfig.allow_left_out, reading: Reading = Reading(),
            end_token: str | None = None,
            parse_special: bool = False, run_dir: Path | None = None, expected: str | None = None,
            remind: bool = True, progress: Progress | None = None) -> Path:
    """The folder of the dataset that a source gives.

    Args:
        path: file or folder of text, None for the built-in corpus.
        out: where dataset folders lie, side by side.
        tokenizer: `bytes`, the path of a tokenizer.json or of a folder that holds one, or one that was loaded.
        domain_cap: bytes of text to take from a domain at most; held-out text of the user's own is not cut.
        held_out: file or folder of held-out text; None takes the validation split that lies there, or a share of the text.
        held_out_share: that share; with 1 all of it is held out.
        overlap: windows of held-out text to look up in the training text at most; 0 for none.
        splits: whether a split that lies there is used; otherwise all of it is one text.
        allow_left_out: share of the bytes that may be left out though nobody asked for it.
        reading: how files are read: keys of records, separator, encoding.
        end_token: the token that ends a document, `new` for one more id; None takes it from the tokenizer's files.
        parse_special: whether special strings inside a text are special tokens.
        run_dir: the directory of a run, of which nothing is read.
        expected: the fingerprint that it has to have; DataError before anything is written where it has another.
        remind: whether to say the account of data that is there, too.
        progress: called as bytes are read and written.
    """
    start = time.monotonic()
    encoder = tokenizer
    if isinstance(encoder, str):
        encoder = load_tokenizer(encoder, end_token=end_token, parse_special=parse_special)
    share = _SHARE if held_out else exact(held_out_share)
    source = find_source(path, held_out, own=(out, run_dir) if run_dir else (out,), splits=splits)
    key = _hash(chain([_FORMAT, encoder.identity, domain_cap, str(share), splits, allow_left_out, reading],
                      source.listing()))
    known = _remembered(out).get(key)
    if (known and (expected is None or expected.startswith(known["folder"]))
            and _is_there(out / known["folder"])):
        return _reuse(out / known["folder"], source.refreshed(known["account"]) if remind else None)
    limit = corpus.HELDOUT_LIMIT if source.path is None and source.held_out is None else None
    with Spool(out) as spool:
        selection = select(source, spool, share=share, reading=reading, domain_cap=domain_cap,
                           allow_left_out=allow_left_out, progress=progress)
        chooses = [selection.heldout] if selection.heldout else _unusual(share)
        fingerprint = _hash([_FORMAT, encoder.identity, limit, selection.chosen, *chooses])
        if expected not in (None, fingerprint):
            raise other_data(path, fingerprint, expected)
        folder = out / fingerprint[:NAME_LENGTH]
        if _is_there(folder):
            account = selection.record(_sides(_open_again(folder).description))
            _say_account(account)
        else:
            files = source.path.files if source.path else selection.chosen
            description = {"fingerprint": fingerprint, "tokenizer": encoder.identity,
                           "vocab_size": encoder.vocab_size,
                           "end_id": encoder.end_id, "parse_special": encoder.parse_special,
                           "source_files": len(files)}
            _build(folder, selection, encoder, description, overlap,
                   progress and partial(progress, "tokenizing"))
            account = _log(open_prepared(folder, verify=False), source, held_out, time.monotonic() - start)
    _remember(out, key, {"folder": folder.name, "account": account})
    return folder


def other_data(path: str | None, fingerprint: str, expected: str) -> DataError:
    return DataError(171, "the data is not what the run was trained on",
                     where=f"{path or 'the built-in corpus'} (data.path)",
                     why=f"its fingerprint is {fingerprint[:12]}, the checkpoint's is {expected[:12]}",
                     next="restore the data, or data.cache=<the folder in which it was prepared>; moetrain "
                          "eval measures other data "
                          "where data.path= is typed")


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


def _build(folder: Path, selection: Selection, encoder: Tokenizer, description: dict[str, Any], overlap: int,
           progress: Callable[[int, int], None] | None) -> None:
    with unfinished(folder) as temporary:
        description = description | write_tokens(temporary, selection.parts, encoder, overlap, progress)
        description["account"] = selection.record(_sides(description))
        if encoder.content is not None:
            write_file(temporary / "tokenizer.json", encoder.content)
        write_description(temporary, description)
        _rename(temporary, folder)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if not _is_there(folder):
            raise unwritable(folder, error) from error
        _open_again(folder)                  # another process was faster; its dataset has the same content


def _reuse(folder: Path, account: dict[str, Any] | None) -> Path:
    _open_again(folder)
    if account is not None:
        _say_account(account)
    return folder


def _open_again(folder: Path) -> Prepared:
    prepared = open_prepared(folder, verify=True)
    log.info("data %s: %s, prepared before", shown(folder), _sizes(prepared))
    return prepared


def _sides(description: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Documents and bytes of both splits."""
    return {split: total(description[split]) for split in ("train", "heldout")}


def _log(prepared: Prepared, source: Source, held_out: str | None, seconds: float) -> dict[str, Any]:
    """Say what was made, and return its account."""
    described = prepared.description
    text = f"prepared {shown(source.name)} in {seconds:.1f} s: {_sizes(prepared)}"
    if held_out is not None:
        text += f" ({shown(held_out)})"
    if described["heldout_overlap"] is not None:
        text += f"; {100 * described['heldout_overlap']:.1f} % of held-out text also occurs in the training text"
    if described["overlap_every"] > 1:
        text += f" (an estimate: {described['overlap_windows']:,} places looked up, one in {described['overlap_every']})"
    if (special := described["special_tokens"]) is not None:
        text += f"; {special:,} special tokens inside documents (data.parse_special)"
    log.info("%s", text)
    _say_account(described["account"])
    return described["account"]


def _say_account(account: dict[str, Any]) -> None:
    # nobody asks what became of it
    if all(ledger["path"] == BUILTIN for ledger in account["files"].values()):
        return
    for line in account_lines(account):
        log.info("%s", line)


def _sizes(prepared: Prepared) -> str:
    train, heldout = (total(prepared.description[split]) for split in ("train", "heldout"))
    return (f"{len(prepared.domains)} domains, {train['tokens']:,} tokens in {train['documents']:,} "
            "documents, "
            f"{heldout['tokens']:,} held out")


def _remembered(out: Path) -> dict[str, dict[str, Any]]:
    """Source key -> folder name and account. It only saves time: whatever is wrong with it, the source is read again."""
    try:
        known = read_json(out / "sources.json", limit=_MOST_REMEMBERED)
    except (OSError, ValueError):
        return {}
    return {key: row for key, row in known.items() if _usable(row)} if isinstance(known, dict) else {}


def _usable(row: Any) -> bool:
    return (isinstance(row, dict) and isinstance(row.get("folder"), str) and row["folder"].isalnum()
            and is_account(row.get("account")))


def _remember(out: Path, key: str, row: dict[str, Any]) -> None:
    try:
        write_file(out / "sources.json", json.dumps(_remembered(out) | {key: row}, indent=1).encode())
    except DiskError as error:
        log.warning("cannot remember what %s was made of: %s", row["folder"], error.why)


def _hash(content: Iterable[Any]) -> str:
    """A hash of values, as JSON has them. Documents are their domains, digests and sizes."""
    found = hashlib.sha256()
    for number, value in enumerate(content):
        found.update(b", " if number else b"[")
        for piece in _rows(value) if isinstance(value, Parts) else (json.dumps(value),):
            found.update(piece.encode())
    found.update(b"]")
    return found.hexdigest()


def _rows(parts: Parts) -> Iterator[str]:
    """A JSON list of [domain, digest, size], a row at a time: a list of millions of them would not fit in memory."""
    names = [json.dumps(name) for name in parts.documents.names]
    before = "["
    for part, domain in zip(parts, parts.domains.tolist()):
        yield f'{before}[{names[domain]}, "{part.document.digest.hex()}", {part.end}]'
        before = ", "
    yield "]" if len(parts) else "[]"

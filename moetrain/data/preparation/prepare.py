"""Preparation of text, once for all runs: read, deduplicate, split, tokenize, write.

    prepare(path=None, out=Path("data"), tokenizer="bytes")  ->  data/<fingerprint>/

The fingerprint is a hash of the tokenizer, of every (domain, content) and of how held-out text was chosen. It
does not depend on where files lie or in which order they come. The folder appears whole or not at all and is
never overwritten (`dataset_folder.py`); an existing one is verified and used. `out/sources.json` remembers
which source (paths, sizes, modification times) gave which fingerprint and account, so an unchanged source is
not read again.

`corpus/selection.py` decides what is read, and on which side of the split. `prepared_dataset.py` and
`tokens/shards.py` hold the file formats.
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
from moetrain.data.corpus.split import as_fraction
from moetrain.data.preparation.by_fingerprint import NAME_LENGTH, prepared_place
from moetrain.data.preparation.dataset_folder import unfinished_folder
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
_MOST_REMEMBERED = 16 << 20                  # bytes of sources.json, which has a few thousand a source
_SHARE = Fraction(1, 20)                     # of the text is held out; only other shares enter a fingerprint


def prepare_from_config(config: Config, run_dir: Path, progress: Progress | None = None, *,
                        tokenizer: Tokenizer | None = None, expected: str | None = None,
                        remind: bool = True) -> Path:
    """Dataset folder of a run with `data=text` or `data=tokens`, prepared now if it is not there yet.

    Args:
        config: the config of the run.
        run_dir: directory of the run; holds the dataset unless `data.cache` names a folder.
        progress: called as bytes are read and written.
        tokenizer: used in place of `data.tokenizer`.
        expected: required fingerprint; nothing is written if the data has another one.
        remind: whether to log the account of data that is already prepared, too.
    """
    data = config.data
    assert data.kind in ("text", "tokens"), data.kind
    if data.kind == "tokens":
        return open_prepared(tokens_path(data.path), verify=False).folder
    out = prepared_place(data, run_dir)
    return prepare(path=data.path, out=out, tokenizer=tokenizer or data.tokenizer, domain_cap=data.domain_cap,
                   held_out=data.held_out, held_out_share=data.held_out_share, overlap=data.overlap,
                   splits=data.split == "respect", allow_left_out=data.allow_left_out,
                   reading=reading_of(data), end_token=data.end_token, parse_special=data.parse_special,
                   run_dir=run_dir, expected=expected, remind=remind, progress=progress)


def tokens_path(path: str | None) -> Path:
    """The folder that `data=tokens` names. DataError if it names none."""
    if not path:
        raise DataError(52, "data=tokens needs a folder of prepared tokens", where="data.path=null",
                        why="there are no built-in tokens",
                        next="data.path=<folder>, or data=text to prepare text")
    return Path(path)


def prepare(*, path: str | None, out: Path, tokenizer: str | Tokenizer, domain_cap: int | None = None,
            held_out: str | None = None, held_out_share: float = DataConfig.held_out_share,
            overlap: int = DataConfig.overlap, splits: bool = True,
            allow_left_out: float = DataConfig.allow_left_out, reading: Reading = Reading(),
            end_token: str | None = None, parse_special: bool = False, run_dir: Path | None = None,
            expected: str | None = None, remind: bool = True, progress: Progress | None = None) -> Path:
    """Prepare a source, or find the dataset that was prepared from it before.

    Args:
        path: file or folder of text; None for the built-in corpus.
        out: folder in which dataset folders lie side by side.
        tokenizer: `bytes`, the path of a tokenizer.json or of a folder that holds one, or a loaded tokenizer.
        domain_cap: bytes of text to take from a domain at most; does not apply to held-out text of the user's
            own.
        held_out: file or folder of held-out text; None takes the validation split found at the path, or a
            share.
        held_out_share: that share; with 1 all text is held out.
        overlap: windows of held-out text to look up in the training text at most; 0 for none.
        splits: whether a split found at the path is used; otherwise all of it is one text.
        allow_left_out: share of the bytes that may be left out by mistake.
        reading: how files are read: keys of records, separator, encoding.
        end_token: token that ends a document, or `new` for one more id; None takes it from the tokenizer's
            files.
        parse_special: whether special strings inside a text become special tokens.
        run_dir: directory of a run, of which nothing is read.
        expected: required fingerprint; DataError before anything is written if the data has another one.
        remind: whether to log the account of data that is already prepared, too.
        progress: called as bytes are read and written.

    Returns:
        The dataset folder, `out`/<fingerprint>.
    """
    start = time.monotonic()
    encoder = tokenizer
    if isinstance(encoder, str):
        encoder = load_tokenizer(encoder, end_token=end_token, parse_special=parse_special)
    share = _SHARE if held_out else as_fraction(held_out_share)
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
        chooses = [selection.heldout] if selection.heldout else _share_for_hash(share)
        fingerprint = _hash([_FORMAT, encoder.identity, limit, selection.chosen, *chooses])
        if expected not in (None, fingerprint):
            raise wrong_data_error(path, fingerprint, expected)
        folder = out / fingerprint[:NAME_LENGTH]
        if _is_there(folder):
            account = selection.record(_sides(_open_existing(folder).description))
            _log_account(account)
        else:
            files = source.path.files if source.path else selection.chosen
            description = {"fingerprint": fingerprint, "tokenizer": encoder.identity,
                           "vocab_size": encoder.vocab_size, "end_id": encoder.end_id,
                           "parse_special": encoder.parse_special, "source_files": len(files)}
            _build(folder, selection, encoder, description, overlap,
                   progress and partial(progress, "tokenizing"))
            account = _log_prepared(open_prepared(folder, verify=False), source, held_out,
                                    time.monotonic() - start)
    _remember(out, key, {"folder": folder.name, "account": account})
    return folder


def wrong_data_error(path: str | None, fingerprint: str, expected: str) -> DataError:
    """The error for data that is not what a checkpoint was trained on.

    Args:
        path: the source; None for the built-in corpus.
        fingerprint: fingerprint of the data found.
        expected: fingerprint that the checkpoint names.
    """
    return DataError(171, "the data is not what the run was trained on",
                     where=f"{path or 'the built-in corpus'} (data.path)",
                     why=f"its fingerprint is {fingerprint[:12]}, the checkpoint's is {expected[:12]}",
                     next="restore the data, or data.cache=<the folder in which it was prepared>; "
                          "moetrain eval measures other data where data.path= is typed")


def _is_there(folder: Path) -> bool:
    """Whether a dataset is in its place. DataError if only a part of it is."""
    if os.path.exists(folder / DESCRIPTION):
        return True
    try:
        parts = os.path.isdir(folder) and any(folder.iterdir())
    except OSError as error:
        raise unwritable(folder, error) from error
    if parts:
        raise lost_description(folder)
    return False


def _share_for_hash(share: Fraction) -> list[str]:
    """What a held-out share adds to the hash.

    The usual share adds nothing, so that datasets prepared before shares could be chosen keep their
    fingerprint.
    """
    return [] if share == _SHARE else [f"held out {share}"]


def _build(folder: Path, selection: Selection, encoder: Tokenizer, description: dict[str, Any], overlap: int,
           progress: Callable[[int, int], None] | None) -> None:
    """Write a dataset to a temporary folder and move it to its place."""
    with unfinished_folder(folder) as temporary:
        description = description | write_tokens(temporary, selection.parts, encoder, overlap, progress)
        description["account"] = selection.record(_sides(description))
        if encoder.content is not None:
            write_file(temporary / "tokenizer.json", encoder.content)
        write_description(temporary, description)
        _rename(temporary, folder)


def _rename(temporary: Path, folder: Path) -> None:
    """Move a finished dataset to its place, unless another process has put the same one there."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if not _is_there(folder):
            raise unwritable(folder, error) from error
        _open_existing(folder)                  # another process was faster with the same content


def _reuse(folder: Path, account: dict[str, Any] | None) -> Path:
    _open_existing(folder)
    if account is not None:
        _log_account(account)
    return folder


def _open_existing(folder: Path) -> Prepared:
    """Verify a dataset that was prepared before, and log its size."""
    prepared = open_prepared(folder, verify=True)
    log.info("data %s: %s, prepared before", shown(folder), _sizes(prepared))
    return prepared


def _sides(description: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Documents, tokens and bytes of both splits."""
    return {split: total(description[split]) for split in ("train", "heldout")}


def _log_prepared(prepared: Prepared, source: Source, held_out: str | None, seconds: float) -> dict[str, Any]:
    """Log what was prepared, and return its account."""
    described = prepared.description
    text = f"prepared {shown(source.name)} in {seconds:.1f} s: {_sizes(prepared)}"
    if held_out is not None:
        text += f" ({shown(held_out)})"
    if described["heldout_overlap"] is not None:
        overlap = 100 * described["heldout_overlap"]
        text += f"; {overlap:.1f} % of held-out text also occurs in the training text"
    if described["overlap_every"] > 1:
        windows, every = described["overlap_windows"], described["overlap_every"]
        text += f" (an estimate: {windows:,} places looked up, one in {every})"
    if (special := described["special_tokens"]) is not None:
        text += f"; {special:,} special tokens inside documents (data.parse_special)"
    log.info("%s", text)
    _log_account(described["account"])
    return described["account"]


def _log_account(account: dict[str, Any]) -> None:
    """Log an account, except that of the built-in corpus."""
    if all(ledger["path"] == BUILTIN for ledger in account["files"].values()):
        return
    for line in account_lines(account):
        log.info("%s", line)


def _sizes(prepared: Prepared) -> str:
    train, heldout = (total(prepared.description[split]) for split in ("train", "heldout"))
    return (f"{len(prepared.domains)} domains, {train['tokens']:,} tokens in "
            f"{train['documents']:,} documents, {heldout['tokens']:,} held out")


def _remembered(out: Path) -> dict[str, dict[str, Any]]:
    """Folder name and account by hash of the source, from `sources.json`.

    The file only saves time: whatever is wrong with it, the source is read again.
    """
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
    """Hash of values in their JSON form. Documents count by domain, digest and size."""
    found = hashlib.sha256()
    for number, value in enumerate(content):
        found.update(b", " if number else b"[")
        for piece in _rows(value) if isinstance(value, Parts) else (json.dumps(value),):
            found.update(piece.encode())
    found.update(b"]")
    return found.hexdigest()


def _rows(parts: Parts) -> Iterator[str]:
    """JSON list of [domain, digest, size], row by row: a list of millions would not fit in memory."""
    names = [json.dumps(name) for name in parts.documents.names]
    before = "["
    for part, domain in zip(parts, parts.domains.tolist()):
        yield f'{before}[{names[domain]}, "{part.document.digest.hex()}", {part.end}]'
        before = ", "
    yield "]" if len(parts) else "[]"

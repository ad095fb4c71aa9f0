"""Report of `moetrain data inspect` on token files: tables for a person, or one record for a program."""

from collections.abc import Iterator
from typing import Any

from moetrain.cli.corpus_report import MOST_ROWS, document_lines, left_out, record_of, rest
from moetrain.cli.table import table
from moetrain.config.schema import Config
from moetrain.data.account.ledgers import HELD, FileLedger
from moetrain.data.inspection import Inspection
from moetrain.data.pretokenized.account import TokenEntry
from moetrain.files import shown
from moetrain.units import count

# Attributes of each file in the record: those of text that apply to tokens, and those that only tokens have.
_FILE = ("name", "size", "side", "reason", "format", "convert", "documents", "domain", "tokens", "heldout",
         "end_id", "end_share")


def as_record(found: Inspection) -> dict[str, Any]:
    """Write an inspection as one object, every file included.

    Its `error` is what training would refuse the tokens for.
    """
    return record_of(found, _FILE)


def lines(found: Inspection, config: Config) -> Iterator[str]:
    """Yield tables of files, of what is left out and of domains, then totals and sample documents."""
    for ledger in found.ledgers:
        yield from _files(ledger)
    if found.found is not None:
        yield from _domains(found.found)
        yield from _amounts(found.found)
        yield from document_lines(found.found["documents"], "ended", _described)


def _files(ledger: FileLedger) -> Iterator[str]:
    record = ledger.record()
    yield f"{shown(ledger.path)} ({ledger.key})   {record['files']:,} files, {record['bytes']:,} bytes"
    yield ""
    entries = (entry for entry in ledger.read if isinstance(entry, TokenEntry))
    read = sorted(entries, key=lambda entry: (-entry.size, entry.name))
    rows = [[f"  {shown(entry.name, 60)}", _format(entry), f"{entry.documents:,}", f"{entry.tokens:,}",
             f"{entry.heldout:,}", f"{entry.size:,}"] for entry in read[:MOST_ROWS]]
    yield from table([["  read", "as", "documents", "tokens", "held out", "bytes"], *rows])
    yield from rest([entry.size for entry in read])
    yield from left_out(record)
    yield ""


def _format(entry: TokenEntry) -> str:
    return f"{shown(entry.format)}{', held out' if entry.side == HELD else ''}"


def _domains(found: dict[str, Any]) -> Iterator[str]:
    domains = sorted(found["domains"].items(), key=lambda item: -item[1]["train"]["tokens"])
    columns = [(side, what) for side in ("train", "heldout") for what in ("documents", "tokens")]
    rows = [[f"  {shown(name, 40)}", *(f"{row[side][what]:,}" for side, what in columns),
             f"{row['share']:.1%}", f"{row['epochs']:.2g}"] for name, row in domains[:MOST_ROWS]]
    heads = ["  domain", "documents", "tokens to train on", "held out", "tokens held out", "share", "epochs"]
    yield from table([heads, *rows])
    yield from rest([row["train"]["tokens"] for _, row in domains])
    yield ""


def _amounts(found: dict[str, Any]) -> Iterator[str]:
    tokens, end = found["tokens"], found["end_token"]
    yield f"  tokens     {count(tokens['train'])} to train on, {count(tokens['heldout'])} held out"
    yield f"  tokenizer  {shown(found['tokenizer'])}, {found['vocab_size']:,} ids"
    closes = "none is known: a file, or what an index calls a document, is one" if end["id"] is None else (
        f"id {end['id']}, in which {end['share']:.1%} of the documents are seen to end")
    yield f"  end token  {closes}"
    if found["weights"]:
        first = list(found["weights"].items())[:MOST_ROWS]
        weights = ", ".join(f"{shown(name, 40)} {weight:g}" for name, weight in first)
        blend = " (of the blend: shares of the samples)" if found["mixture"] is None else ""
        yield f"  weights    {weights}{blend}"
    yield (f"  epochs     {found['epochs']:.2g} in run.steps={found['steps']:,} steps of "
           f"{found['tokens_per_step']:,} tokens")


def _described(document: dict[str, Any], ids: str) -> str:
    return f"{document['length']:,} tokens: {ids}{' …' * (document['length'] > 12)}"

"""Report of `moetrain data inspect` on text: tables for a person, or one record for a program."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from moetrain.cli.table import table
from moetrain.config.schema import Config
from moetrain.data.account.ledgers import HELD, FileEntry, FileLedger, writable_name
from moetrain.data.account.text import formats_text, reasons, splits_text, text_lines
from moetrain.data.inspection import Inspection
from moetrain.errors import CONTINUED
from moetrain.files import shown
from moetrain.units import count

MOST_ROWS = 20    # of a table; the largest first
MOST_TEXT = 300   # characters of a document


def as_record(found: Inspection) -> dict[str, Any]:
    """Write an inspection as one object, every file included.

    Its `error` is what `prepare` would refuse the text for.
    """
    return record_of(found, tuple(field.name for field in fields(FileEntry)))


def record_of(found: Inspection, names: Sequence[str]) -> dict[str, Any]:
    """Write an inspection as one object; `names` are the attributes that it has of each file."""
    files = {ledger.key: [_file(entry, names) for entry in ledger.entries] for ledger in found.ledgers}
    said = ("id", "what", "where", "why", "next")
    error = found.error and {name: writable_name(str(getattr(found.error, name))) for name in said}
    return {**(found.found or {}), "files": files, "error": error}


def lines(found: Inspection, config: Config) -> Iterator[str]:
    """Yield tables of files, of what is left out and of domains, then totals and sample documents."""
    for ledger in found.ledgers:
        yield from _files(ledger)
    if found.found is not None:
        yield from _domains(found.found)
        yield from text_lines(found.found["account"]["text"])
        yield from _amounts(found.found, config)
        yield from document_lines(found.found["documents"], "complete", _described)
        if found.error is not None:
            yield f"\nprepare would refuse this ({found.error.id}): {found.error.what}"
            yield from (f"  {shown(line)}" for line in found.error.why.split(CONTINUED))
            yield f"  try {shown(found.error.next)}"
    else:
        yield ""


def _file(entry: FileEntry, names: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in names}
    return {name: writable_name(value) if isinstance(value, str) else value for name, value in values.items()}


def _files(ledger: FileLedger) -> Iterator[str]:
    record = ledger.record()
    yield f"{shown(ledger.path)} ({ledger.key})   {record['files']:,} files, {record['bytes']:,} bytes"
    if record["splits"]:
        yield f"  splits: {splits_text(record)}"
    read = sorted(ledger.read, key=lambda entry: (-entry.size, entry.name))
    rows = [[f"  {shown(entry.name, 60)}", _format(entry), f"{entry.documents:,}", f"{entry.text:,}",
             f"{entry.size:,}"] for entry in read[:MOST_ROWS]]
    yield ""
    yield from table([["  read", "as", "documents", "bytes of text", "bytes"], *rows])
    yield from rest([entry.size for entry in read])
    yield f"  in all: {formats_text(record)}"
    yield from left_out(record)
    yield ""


def left_out(record: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the files that are left out, by reason and format."""
    if record["left_out"]:
        yield ""
        kinds = record["left_out"]
        rows = [[f"  {reasons([row])[0].partition(':')[0]}", shown(row["first"], 60), f"{row['files']:,}",
                 f"{row['bytes']:,}"] for row in kinds[:MOST_ROWS]]
        yield from table([["  left out", "the first", "files", "bytes"], *rows])
        yield from rest([row["bytes"] for row in kinds])
        yield from (f"  {shown(row['format'])}: {shown(row['convert'])}"
                    for row in kinds if row.get("convert"))


def _format(entry: FileEntry) -> str:
    packed = f" in {shown(entry.compression)}" if entry.compression else ""
    side = ", held out" if entry.side == HELD else ""
    marred = f", {entry.undecodable:,} bytes undecodable" if entry.undecodable else ""
    return f"{shown(entry.format)}{packed}{side}{marred}"


def rest(sizes: list[int]) -> Iterator[str]:
    """Yield the totals of the rows that a table does not show."""
    if len(sizes) > MOST_ROWS:
        yield f"  and {len(sizes) - MOST_ROWS:,} more, {sum(sizes[MOST_ROWS:]):,} bytes"


def _domains(found: dict[str, Any]) -> Iterator[str]:
    domains = sorted(found["domains"].items(), key=lambda item: -item[1]["train"]["bytes"])
    columns = [(side, what) for side in ("train", "heldout") for what in ("documents", "bytes")]
    rows = [[f"  {shown(name, 40)}", *(f"{sides[side][what]:,}" for side, what in columns)]
            for name, sides in domains[:MOST_ROWS]]
    yield from table([["  domain", "documents", "bytes to train on", "held out", "bytes held out"], *rows])
    yield from rest([sides["train"]["bytes"] for _, sides in domains])
    yield ""


def _amounts(found: dict[str, Any], config: Config) -> Iterator[str]:
    tokens, about = found["tokens"], "about " if found["tokens"]["estimated"] else ""
    yield (f"  tokens    {about}{count(tokens['train'])} to train on, "
           f"{about}{count(tokens['heldout'])} held out (data.tokenizer={shown(config.data.tokenizer)}, "
           f"{tokens['bytes_per_token'] or 0:.2f} bytes a token)")
    if found["epochs"] is not None:
        yield (f"  epochs    {found['epochs']:.2g} in run.steps={found['steps']:,} steps of "
               f"{found['tokens_per_step']:,} tokens")


def document_lines(documents: list[dict[str, Any]], ended: str,
                   describe: Callable[[dict, str], str]) -> Iterator[str]:
    """Yield two lines for each sample: domain, size and first tokens, then the text where it is known.

    Args:
        documents: records of an inspection.
        ended: key of the flag that says whether the text is the whole document.
        describe: size and tokens as text, from the record and its first ids.
    """
    if documents:
        yield "\ndocuments as they are trained on, by their first tokens:"
    for document in documents:
        ids = " ".join(map(str, document["tokens"][:12]))
        yield f"  [{shown(document['domain'], 40)}] {describe(document, ids)}"
        if document["text"] is not None:
            yield f"    {shown(document['text'], MOST_TEXT)}{' <end>' if document[ended] else ''}"


def _described(document: dict[str, Any], ids: str) -> str:
    return f"{document['bytes']:,} bytes, tokens {ids} …"

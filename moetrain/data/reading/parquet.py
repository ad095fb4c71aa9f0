"""Rows of Parquet files by pyarrow: the text and domain columns, a batch of rows at a time."""

import itertools
from collections.abc import Iterator
from typing import Any

from moetrain.data.reading.records import Reading, RecordFields, missing_key, no_domain
from moetrain.data.reading.spool import Spool
from moetrain.data.reading.text_file import TextFile
from moetrain.errors import DataError
from moetrain.files import reason, shown

MAGIC = b"PAR1"
_BATCH = 8 << 20                    # bytes of a batch, roughly: uncompressed columns
_BUFFER = 1 << 20                   # bytes of a file read at once


def parquet_rows(file: TextFile, spool: Spool) -> Iterator[tuple[bytes, str]]:
    """Yield text and own domain of every row. `spool` unpacks a file that is compressed as a whole."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(135, "a Parquet file needs pyarrow", where=str(file.path), why=reason(error),
                        next="pip install 'moetrain[parquet]', or in a checkout: "
                             "pip install -e '.[parquet]'") from error
    try:
        # A file inside another compression is unpacked first: Parquet has its table of contents at the end.
        source = file.stream.file if file.stream.compression is None else spool.unpacked(file.stream.read)
        yield from _rows(file, pyarrow.parquet.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False))
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DataError(134, "a Parquet file cannot be read", where=str(file.path),
                        why=reason(error).splitlines()[0],
                        next="copy the file again: it is damaged or cut off") from error


def _rows(file: TextFile, table: Any) -> Iterator[tuple[bytes, str]]:
    number, schema, reading = 0, table.schema_arrow, file.reading

    def place() -> str:
        return f"{file.path}, row {number}"

    text, domain = _column(schema, reading.text_key or ""), _column(schema, reading.domain_key or "")
    if text is None:
        first = [row for batch in itertools.islice(table.iter_batches(batch_size=1), 1)
                 for row in batch.to_pylist()]
        record = first[0] if first else dict.fromkeys(schema.names)
        raise missing_key(reading.text_key or "", record, str(file.path), as_text=False)
    if domain is None and reading.domain_key not in (None, Reading().domain_key):
        raise no_domain(reading.domain_key or "", list(_columns(schema)), file.path)
    if twice := [path[0] for path in (text, domain) if path and schema.names.count(path[0]) > 1]:
        raise DataError(133, "a table cannot be read", where=str(file.path),
                        why=f"two of its columns are named {shown(twice[0])}",
                        next="write it with one of them, or data.text_key=<another column>")
    fields = RecordFields(reading, file.entry, place)
    rows = table.metadata.num_rows
    size = sum(table.metadata.row_group(group).total_byte_size
               for group in range(table.metadata.num_row_groups))
    columns = [".".join(path) for path in (text, domain) if path]
    for batch in table.iter_batches(batch_size=max(_BATCH * rows // max(size, 1), 1), columns=columns,
                                    use_threads=False):
        file.advance(file.entry.size * number // max(rows, 1))
        texts, domains = _values(batch, text), _values(batch, domain) if domain else [None] * len(batch)
        for value, own in zip(texts, domains):
            number += 1
            yield fields.text(value), fields.domain(own)


def _columns(schema: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and types of the columns; those of structs as paths."""
    for field in schema:
        if hasattr(field.type, "fields") and str(field.type).startswith("struct"):
            yield from _columns(field.type, f"{before}{field.name}.")
        else:
            yield before + field.name, field.type


def _column(schema: Any, key: str) -> tuple[str, ...] | None:
    """Names that lead to a column: the key as it is written, else as a path. None if it is not there."""
    if key in schema.names:
        return (key,)
    path, fields = tuple(key.split(".")), {field.name: field for field in schema}
    for part in path:
        if part not in fields:
            return None
        kind = fields[part].type
        fields = {field.name: field for field in kind} if str(kind).startswith("struct") else {}
    return path


def _values(batch: Any, path: tuple[str, ...]) -> list[Any]:
    """Values of one column of a batch, looked up inside structs."""
    values = batch.column(path[0]).to_pylist()
    for name in path[1:]:
        values = [None if value is None else value.get(name) for value in values]
    return values

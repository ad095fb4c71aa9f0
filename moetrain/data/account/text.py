"""An account as lines of text, from `Account.record` or from the copy of it that a `dataset.json` keeps."""

from typing import Any

from moetrain.data.account.ledgers import CUT, HELD, TRAINED
from moetrain.files import shown

_MOST = 6                                    # kinds of files named in one line
_ROLES = {"train": "trained on", "valid": "held out", "test": "left alone"}


def account_lines(record: dict[str, Any]) -> list[str]:
    """The account in short: files found, read and left out with reasons, and what became of the text."""
    lines = []
    for key, ledger in record["files"].items():
        lines.append(f"{shown(ledger['path'])} ({key}): {_files(ledger)}")
        if ledger["splits"]:
            lines.append(f"  splits    {splits_text(ledger)}")
        lines.append(f"  read      {_files(_total(ledger['read']))}: {formats_text(ledger)}")
        if ledger["left_out"]:
            lines.append(f"  left out  {_files(_total(ledger['left_out']))}: "
                         f"{_cut(reasons(ledger['left_out'], examples=True))}")
    return [*lines, *text_lines(record["text"])]


def formats_text(ledger: dict[str, Any]) -> str:
    """The files that are read, grouped by format, compression and side."""
    return _cut([_format(row) for row in ledger["read"]])


def text_lines(text: dict[str, Any]) -> list[str]:
    """Lines on what became of the text, on empty texts and on undecodable bytes."""
    became = [f"{what} {tally['bytes']:,}" for what, tally in text["became"].items() if tally["bytes"]]
    lines = [f"  text      {text['bytes']:,} bytes in {_number(text['documents'], 'document')}: "
             f"{', '.join(became)}"]
    if text["empty"]:
        lines.append(f"  empty     {_number(text['empty'], 'text')}")
    if text["undecodable"]["bytes"]:
        marred = text["undecodable"]
        files = _number(marred["files"], "file")
        lines.append(f"  undecodable  {marred['bytes']:,} bytes in {files}, most in {shown(marred['first'])}")
    return lines


def splits_text(ledger: dict[str, Any]) -> str:
    """The splits found at a path, and what is done with each."""
    instead = any(row["reason"] == "validation split" for row in ledger["left_out"])
    done = _ROLES | ({"valid": "left alone, data.held_out names another"} if instead else {})
    parts = [f"{role} {done[role]} ({_number(split['files'], 'file')}, as {shown(split['first'])})"
             for role in done if (split := ledger["splits"].get(role))]
    return f"{', '.join(parts)}; data.split=merge takes all of it as one text"


def reasons(rows: list[dict[str, Any]], *, examples: bool = False) -> list[str]:
    """Reasons for leaving files out, each with the number of files and their bytes.

    Args:
        rows: the `left_out` rows of a ledger.
        examples: also name one file of each row, and what would convert it.
    """
    found = []
    for row in rows:
        text = f"{row['reason']}{', ' + shown(row['format']) if row['format'] else ''}: {_files(row)}"
        if examples:
            advice = f"; {shown(row['convert'])}" if row.get("convert") else ""
            text += f" ({shown(row['first'], 80)}{advice})"
        found.append(text)
    return found


def left_out_line(record: dict[str, Any]) -> str:
    """One line on text that is not used, for readers who skip the account; empty if all of it is used."""
    parts = [f"{why}{key != 'data.path' and f' ({key})' or ''}" for key, ledger in record["files"].items()
             for why in reasons([row for row in ledger["left_out"] if row["bytes"]])]
    became = record["text"]["became"]
    parts += [f"{what} {tally['bytes']:,} bytes" for what, tally in became.items()
              if tally["bytes"] and what not in (TRAINED, HELD, CUT)]  # only the built-in corpus has CUT
    if record["text"]["undecodable"]["bytes"]:
        parts.append(f"undecodable {record['text']['undecodable']['bytes']:,} bytes")
    return _cut(parts)


def _format(row: dict[str, Any]) -> str:
    packed = f" in {shown(row['compression'])}" if row["compression"] else ""
    side = ", held out" if row["side"] == HELD else ""
    return f"{shown(row['format'])}{packed}{side} {_files(row)}"


def _files(row: dict[str, Any]) -> str:
    return f"{_number(row['files'], 'file')}, {row['bytes']:,} bytes"


def _total(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in ("files", "bytes")}


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _cut(parts: list[str]) -> str:
    more = [f"and {len(parts) - _MOST} more kinds"] * (len(parts) > _MOST)
    return "; ".join([*parts[:_MOST], *more])


def is_account(value: Any) -> bool:
    """Whether a value read from a file has the shape of `Account.record`.

    Functions of this module may take such a value without further checks.
    """
    if not (isinstance(value, dict) and isinstance(value.get("files"), dict)
            and isinstance(value.get("text"), dict)):
        return False
    return all(map(_is_ledger, value["files"].values())) and _is_text(value["text"])


def _is_ledger(value: Any) -> bool:
    return (_has(value, {"path": str, "files": int, "bytes": int, "read": list, "left_out": list,
                         "splits": dict})
            and all(_has(row, _ROW | {"side": str, "format": str, "compression": str})
                    for row in value["read"])
            and all(_has(row, _ROW | {"reason": str, "format": str}) for row in value["left_out"])
            and all(_has(row, _ROW) for row in value["splits"].values()))


def _is_text(value: Any) -> bool:
    return (_has(value, {"documents": int, "bytes": int, "became": dict, "empty": int, "undecodable": dict})
            and all(_has(tally, {"documents": int, "bytes": int}) for tally in value["became"].values())
            and _has(value["undecodable"], _ROW))


_ROW = {"files": int, "bytes": int, "first": str}


def _has(value: Any, types: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in types.items())

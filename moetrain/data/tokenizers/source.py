"""Files behind `data.tokenizer=<path>`: a `tokenizer.json`, alone or in a folder, and the settings beside it.

Tokenizers in other formats are recognized by content; the error names the command that converts them.
"""

import base64
import binascii
import codecs
import json
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from moetrain.errors import DataError
from moetrain.files import parse_json, read_bytes, reason

FILE = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
_MOST_BYTES = 256 << 20  # of a tokenizer.json; the largest vocabularies take 35 MB
_MOST_SETTINGS = 64 << 20


class OtherFormat(NamedTuple):
    """A tokenizer format that is not read.

    Args:
        name: the format, as a noun with its article.
        usual: file name under which transformers finds such a file; None if it needs further files beside it.
        package: package that transformers needs to read the format.
    """

    name: str
    usual: str | None
    package: str


SENTENCEPIECE = OtherFormat("a sentencepiece model", "tokenizer.model", "sentencepiece")
TIKTOKEN = OtherFormat("tiktoken ranks", "tokenizer.model", "tiktoken")
TEKKEN = OtherFormat("a tekken tokenizer", "tekken.json", "tiktoken")
VOCABULARY = OtherFormat(
    "a vocabulary without its rules (it has merges.txt or a tokenizer_config.json beside it)", None, "")
SETTING = OtherFormat("the settings of a tokenizer, not the tokenizer", None, "")


class TokenizerSource(NamedTuple):
    """A tokenizer.json and the settings beside it.

    Args:
        path: the tokenizer.json.
        content: its bytes, without a byte order mark.
        settings: JSON objects beside it, by file name.
    """

    path: Path
    content: bytes
    settings: dict[str, dict[str, Any]]


def find_tokenizer(path: Path) -> TokenizerSource:
    """Read the tokenizer.json at a path or in the folder there. DataError if there is none."""
    if path.is_dir():
        path = _in_folder(path)
    try:
        content = read_bytes(path, limit=_MOST_BYTES)
    except OSError as error:
        raise _unreadable(path, reason(error)) from error
    if other := recognize(content):
        raise _other_format(path, other)
    return TokenizerSource(path, content.removeprefix(codecs.BOM_UTF8), _settings(path.parent))


def recognize(content: bytes) -> OtherFormat | None:
    """Format of a file that is no tokenizer.json; None if it may be one."""
    content = content.removeprefix(codecs.BOM_UTF8)
    if _is_sentencepiece(content):
        return SENTENCEPIECE
    if not content.lstrip().startswith(b"{"):
        return _of_lines(content)
    if b'"model"' in content:                       # large, and parsed by the library anyway
        return None
    try:
        value = parse_json(content)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("vocab"), list) and "config" in value:
        return TEKKEN
    if value and all(type(id) is int for id in value.values()):
        return VOCABULARY
    return SETTING if "tokenizer_class" in value or "eos_token" in value or "eos_token_id" in value else None


def _is_sentencepiece(content: bytes) -> bool:
    """Whether the bytes begin like a SentencePiece ModelProto.

    Its first field is a piece: a message whose first field is a string, followed by a score or a type.
    """
    if len(content) < 8 or content[0] != 0x0A or content[2] != 0x0A:
        return False
    length = content[3]
    return length + 2 <= content[1] and content[4 + length:5 + length] in (b"\x15", b"\x18")


def _of_lines(content: bytes) -> OtherFormat | None:
    lines = content[:1 << 16].splitlines()[:-1][:64] or content.splitlines()[:64]
    if not lines:
        return None
    if all(_is_rank(line) for line in lines):
        return TIKTOKEN
    return VOCABULARY if lines[0].startswith(b"#version") or b"[UNK]" in content.splitlines() else None


def _is_rank(line: bytes) -> bool:
    """Whether a line is a base64 token and its rank, as tiktoken writes them."""
    token, _, rank = line.partition(b" ")
    try:
        return rank.isdigit() and bool(base64.b64decode(token, validate=True))
    except binascii.Error:
        return False


def _in_folder(folder: Path) -> Path:
    """The tokenizer.json of a folder, else a file in another format, which the caller refuses by name."""
    path = folder / FILE
    if path.exists():
        return path
    for name in ("tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
                 "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    raise _unreadable(folder, f"it is a folder that holds no {FILE}")


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in SETTINGS:
        try:
            value = parse_json(read_bytes(folder / name, limit=_MOST_SETTINGS).removeprefix(codecs.BOM_UTF8))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DataError(153, "the settings of the tokenizer cannot be read",
                            where=f"{folder / name} (data.tokenizer)", why=reason(error),
                            next=f"restore the file, or copy {FILE} to a folder of its own and say "
                                 "data.end_token=<the token that ends a document>") from error
        if isinstance(value, dict):
            found[name] = value
    return found


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(20, "the tokenizer cannot be read", where=f"{path} (data.tokenizer)", why=why,
                     next=f"data.tokenizer=bytes, or the path of a {FILE} or of a folder that holds one")


def _other_format(path: Path, other: OtherFormat) -> DataError:
    folder = path.parent
    out = folder / "converted"
    source, copy = folder, ""
    if other.usual not in (None, path.name):
        source, usual = out, out / (other.usual or "")
        copy = f"mkdir -p {quote(str(out))} && cp {quote(str(path))} {quote(str(usual))} && "
    script = ("from transformers import AutoTokenizer; "
              f"AutoTokenizer.from_pretrained({json.dumps(str(source))}).save_pretrained({json.dumps(str(out))})")
    package = f"transformers {other.package}".strip()
    return DataError(150, f"{other.name}, not a {FILE}", where=f"{path} (data.tokenizer)",
                     why="only the format of the tokenizers library is read",
                     next=f"pip install {package}; {copy}python -c {quote(script)}; then "
                          f"data.tokenizer={quote(str(out))}")

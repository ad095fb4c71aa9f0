"""Recognition of files whose format is not read, by their first bytes, with advice on how to convert them.

In an advice `{path}` is the file, `{folder}` its folder and `{stem}` the file without its suffix, all quoted
for a shell; with `!r` they are quoted for Python.
"""

import re
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from moetrain.data.account.ledgers import NotText

_DATASETS = "python -c \"import datasets; datasets.load_from_disk({folder!r}).to_json('text.jsonl')\""
_UNPACK_ZIP = "unzip {path} -d <folder>, then data.path=<folder>"
_MEMMAP = "data=memmap data.path={path}"
_TRANSCRIBE = "text alone is read: leave it out"
_NPZ = "python -c \"import numpy; print(numpy.load({path!r}).files)\" says what it holds"


class _Signature(NamedTuple):
    """First bytes of a format.

    Args:
        pattern: regular expression, matched at the beginning of a file.
        name: the format, as a noun with its article.
        convert: command or advice that turns such a file into text.
    """

    pattern: bytes
    name: str
    convert: str = ""


# The first match counts. A zip archive has the name of its first member at byte 30.
_SIGNATURES = tuple(_Signature(*row) for row in (
    (rb"ARROW1\0\0", "an Arrow IPC file", "python -c \"import pyarrow as a, pyarrow.parquet as p; "
     "p.write_table(a.ipc.open_file({path!r}).read_all(), 'text.parquet')\""),
    (rb"\xff\xff\xff\xff....\x10\0\0\0", "an Arrow stream, as the datasets library keeps it", _DATASETS),
    (rb"PK\x03\x04.{26}(?:\[Content_Types\]\.xml|_rels/|docProps/|xl/)(?=.{0,60000}?xl/w)",
     "an Excel workbook", "libreoffice --headless --convert-to csv {path}"),
    (rb"PK\x03\x04.{26}(?:\[Content_Types\]\.xml|_rels/|docProps/|word/|xl/|ppt/)", "an Office document",
     "pandoc -t plain {path} -o text.txt, or libreoffice --headless --convert-to txt {path}"),
    (rb"PK\x03\x04.{26}mimetypeapplication/epub", "an EPUB book", "pandoc -t plain {path} -o text.txt"),
    (rb"PK\x03\x04.{26}mimetypeapplication/vnd\.oasis", "an OpenDocument file",
     "pandoc -t plain {path} -o text.txt"),
    (rb"PK\x03\x04.{26}[^/\0]{1,200}\.npy", "a numpy archive (.npz)", _NPZ),
    (rb"PK\x03\x04.{26}[^/\0]{1,200}/(?:data\.pkl|byteorder|version)", "a PyTorch checkpoint", _TRANSCRIBE),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip archive", _UNPACK_ZIP),
    (rb".{257}ustar", "a tar archive (WebDataset keeps shards so)",
     "mkdir <folder>; tar -xf {path} -C <folder>, then data.path=<folder>"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {path} -o<folder>, then data.path=<folder>"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unrar x {path} <folder>/, then data.path=<folder>"),
    (rb"\x04\x22\x4d\x18", "a file compressed by lz4", "lz4 -d {path}"),
    (rb"\xff\x06\0\0sNaPpY", "a file compressed by snappy", "snzip -d {path}"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ\0|BZh[1-9]1AY&SY", "a compressed file in a compressed file",
     "unpack {path} once"),
    (rb"LZIP[\0\x01]", "a file compressed by lzip", "lzip -d {path}"),
    (rb"\x1f\x9d", "a file compressed by compress", "gzip -d {path}"),
    (rb"\]\0\0..\xff{8}", "a file compressed by lzma", "xz --format=lzma -d {path}"),
    (rb"WARC/\d\.\d\r?\n", "a WARC archive of crawled pages",
     "write its text as JSON lines, with warcio or resiliparse"),
    (rb"%PDF-", "a PDF document", "pdftotext {path} text.txt"),
    (rb"\{\\rtf", "an RTF document", "pandoc -t plain {path} -o text.txt"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document of before 2007",
     "libreoffice --headless --convert-to txt {path}"),
    (rb"SQLite format 3\0", "an SQLite database",
     "sqlite3 -json {path} 'select text from <table>' > text.json"),
    (rb"\x93NUMPY", "a numpy array", f"{_MEMMAP} for token ids"),
    (rb"MMIDIDX\0\0", "the index of a Megatron dataset", "data=megatron data.path=<its path without .idx>"),
    (rb"TNTIDX\0\0", "the index of a Megatron dataset of an old form",
     "preprocess the text again with Megatron-Core"),
    (rb"(?:\x88\xd8\x34\x01|\xa1\xd9\x34\x01)[\x01-\x10]\0\0\0", "a token file of llm.c", _MEMMAP),
    (rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|BM.{4}\0\0\0\0", "an image",
     _TRANSCRIBE),
    (rb"RIFF....(?:WAVE|AVI )|ID3[\x02-\x04]\0|OggS\0|fLaC\0|\0\0..ftyp|\x1aE\xdf\xa3", "audio or video",
     _TRANSCRIBE),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", "write its text with h5py as JSON lines"),
    (rb"Obj\x01", "an Avro file", "fastavro {path} > text.jsonl"),
    (rb"ORC(?=.{0,200}\0)", "an ORC file", "python -c \"import pyarrow.orc as o, pyarrow.parquet as p; "
     "p.write_table(o.read_table({path!r}), 'text.parquet')\""),
    (rb"GGUF[\x01-\x10]\0", "a GGUF model", _TRANSCRIBE),
    (rb".{5}\0\0\0\{\"", "a safetensors file", _TRANSCRIBE),
    (rb"\x7fELF|MZ.{0,62}\0|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|\0asm\x01\0\0\0", "a program", _TRANSCRIBE),
    (rb"\x80[\x02-\x05][\x95c}\]K(q\x8a]", "a Python pickle",
     "write its text as JSON lines, in the program that wrote it"),
    (rb"version https://git-lfs\.github\.com/spec/",
     "a Git LFS pointer, which stands for a file that is not here",
     "git lfs pull, in the folder of the repository"),
    # The tokenizers library and mistral-common write the keys in this order.
    (rb"(?:\xef\xbb\xbf)?\s*\{\s*\"version\"\s*:\s*\"[\d.]+\"\s*,\s*\"truncation\"\s*:"
     rb".{0,400}?\"padding\"\s*:.{0,400}?\"added_tokens\"",
     "a tokenizer.json, which is a tokenizer and no text",
     "data.tokenizer={path}, and leave it out of the text"),
    (rb"(?:\xef\xbb\xbf)?\s*\{\s*\"config\"\s*:\s*\{\s*\"pattern\".{0,4000}?\"default_vocab_size\"",
     "a tekken.json, which is a tokenizer of mistral-common and no text",
     "data.tokenizer needs a tokenizer.json"),
    # SentencePiece: the first piece of a protobuf message.
    (rb"\n.{1,2}\n.(?:<unk>|<pad>|<s>|</s>|\[PAD\]|\[UNK\])\x15",
     "a SentencePiece model, which is a tokenizer and no text",
     "data.tokenizer needs a tokenizer.json: transformers writes one from it by "
     "AutoTokenizer.from_pretrained({folder!r}).save_pretrained"),
))
_COMPILED = tuple((re.compile(row.pattern, re.DOTALL), row) for row in _SIGNATURES)

_RANK = re.compile(rb"[A-Za-z0-9+/]{2}== (\d+)\r?")       # a one-byte token in base64, and its rank


def refuse_unsupported(head: bytes, path: Path, name: str) -> None:
    """Raise NotText for a file that begins like a format that is not read.

    Args:
        head: first kilobytes of the file, decompressed.
        path: the file.
        name: its name without the suffix of a compression.
    """
    for pattern, row in _COMPILED:
        if pattern.match(head):
            raise _not_text(row.name, path, row.convert)
    suffix = Path(name).suffix.lower()
    if suffix == ".mds" and b"\0" in head[:64]:
        raise _not_text("a shard of MosaicML Streaming (MDS)", path,
                        "python -c \"import json, streaming; [print(json.dumps("
                        "dict(text=s['text']))) for s in streaming.StreamingDataset(local={folder!r})]\" > "
                        "text.jsonl")
    if suffix == ".tfrecord" and b"\0" in head[:12]:
        raise _not_text("TFRecord", path, "write its text as JSON lines, with tensorflow")
    if suffix == ".bin" and b"\0" in head[:65536]:
        index = path.with_suffix(".idx").exists()
        raise _not_text("the tokens of a Megatron dataset" if index else "binary, by its name a token file",
                        path, "data=megatron data.path={stem}" if index else _MEMMAP)
    if _ranks(head):
        raise _not_text("the ranks of a tiktoken tokenizer", path,
                        "a tokenizer is no text: leave it out; data.tokenizer needs a tokenizer.json")


def refuse_unsupported_json(value: dict, path: Path) -> None:
    """Raise NotText for a file of one JSON object that describes other files."""
    shards = value.get("shards")
    if (isinstance(shards, list) and shards
            and all(isinstance(shard, dict) and shard.get("format") == "mds" for shard in shards)):
        raise _not_text("the index of MosaicML Streaming (MDS)", path, "it describes shards: see there")


def _ranks(head: bytes) -> bool:
    """Whether the first lines are single bytes in base64, ranked from 0 on, as tiktoken writes them."""
    lines = head[:4096].split(b"\n")[:-1][:8]
    found = [_RANK.fullmatch(line) for line in lines]
    return len(lines) == 8 and all(found) and [int(match[1]) for match in found if match] == list(range(8))


def _not_text(name: str, path: Path, convert: str) -> NotText:
    places = {"path": str(path), "folder": str(path.parent), "stem": str(path.with_suffix(""))}
    for key, place in places.items():
        convert = convert.replace(f"{{{key}}}", quote(place)).replace(f"{{{key}!r}}", repr(place))
    return NotText(name, why=f"its first bytes are those of {name}", convert=convert)

"""A second reader of prepared data, from docs/reference/files.md alone: struct, json, zlib and numpy.

It shares no line with the package, so what it decodes is evidence. Every size and checksum that the page
names is verified.
"""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK = 1 << 20                                      # tokens of a checksum


class StoredDocument(NamedTuple):
    """What a shard holds between two end ids."""

    domain: str
    ids: np.ndarray


class StoredDataset(NamedTuple):
    """dataset.json, the documents of each split in the order they lie, and the same as text."""

    description: dict[str, Any]
    train: list[StoredDocument]
    heldout: list[StoredDocument]

    def texts(self, split: str,
              decode: Callable[[np.ndarray], bytes] | None = None) -> list[tuple[str, bytes]]:
        """Domain and text of every document; bytes unless another way to decode is given."""
        decode = decode or (lambda ids: ids.astype(np.uint8).tobytes())
        return [(document.domain, decode(document.ids)) for document in getattr(self, split)]


def read_dataset(folder: Path) -> StoredDataset:
    """Every document of a prepared folder, with all that the folder says about itself checked."""
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert description["format"] == 1 and folder.name == description["fingerprint"][:16]
    assert description["domains"] == sorted(description["domains"])
    shards = {path.name for path in folder.glob("*.tokens")}
    assert shards == set(description["shards"]), "dataset.json names other files than are there"
    splits = {}
    for split in ("train", "heldout"):
        documents: list[StoredDocument] = []
        text_bytes = 0
        for path in sorted(folder.glob(f"{split}-*.tokens")):
            shard, size = _read_shard(path, description)
            documents += shard
            text_bytes += size
        places = [description["domains"].index(document.domain) for document in documents]
        assert places == sorted(places), "documents are not sorted by domain"
        _check_counts(description, split, documents, text_bytes)
        splits[split] = documents
    return StoredDataset(description, splits["train"], splits["heldout"])


def _read_shard(path: Path, description: dict[str, Any]) -> tuple[list[StoredDocument], int]:
    """The documents of a shard without their end ids, and the bytes of text that it says it has."""
    content = path.read_bytes()
    magic, version, length, crc = struct.unpack_from("<8sIII", content)
    assert (magic, version) == (b"MOETOKEN", 1)
    start = struct.calcsize("<8sIII")
    assert zlib.crc32(content[start:start + length]) == crc == description["shards"][path.name]
    header = json.loads(content[start:start + length])
    assert header["domains"] == description["domains"] and header["vocab_size"] == description["vocab_size"]
    assert header["dtype"] == ("uint16" if header["vocab_size"] <= 65_536 else "uint32")
    dtype = np.dtype("<u2" if header["dtype"] == "uint16" else "<u4")
    number, at = header["documents"], start + length
    index = content[at:at + 8 * (number + 1) + 4 * number]
    assert zlib.crc32(index) == header["index_crc"]
    offsets = np.frombuffer(index, "<i8", number + 1)
    domains = np.frombuffer(index, "<i4", number, 8 * (number + 1))
    body = content[at + len(index):]
    assert len(body) == header["tokens"] * dtype.itemsize, "bytes after the last token, or too few"
    step = BLOCK * dtype.itemsize
    blocks = [body[place:place + step] for place in range(0, len(body), step)]
    assert [zlib.crc32(block) for block in blocks] == header["block_crc"]
    tokens, end = np.frombuffer(body, dtype), description["end_id"]
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) > 0).all()
    assert not len(tokens) or int(tokens.max()) < description["vocab_size"]
    documents = []
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), domains.tolist(), strict=True)
    for first, behind, domain in bounds:
        ids = tokens[first:behind]
        assert ids[-1] == end and not (ids[:-1] == end).any(), "an end id is missing, or is inside a document"
        documents.append(StoredDocument(header["domains"][domain], ids[:-1]))
    return documents, header["text_bytes"]


def _check_counts(description: dict[str, Any], split: str, documents: list[StoredDocument],
                  text_bytes: int) -> None:
    """Documents, tokens and (of byte data) bytes by domain are those that dataset.json gives."""
    said = description[split]
    assert set(said) == set(description["domains"])
    for domain, counts in said.items():
        own = [len(document.ids) for document in documents if document.domain == domain]
        assert (counts["documents"], counts["tokens"]) == (len(own), sum(own) + len(own)), (split, domain)
        assert description["tokenizer"] != "bytes" or counts["bytes"] == sum(own)
    assert sum(counts["bytes"] for counts in said.values()) == text_bytes

"""Prepared datasets: folders of token shards with a description, written once and never changed.

    dataset.json         fingerprint, tokenizer, vocabulary, domains, counts by split, shards with their
                         checksums
    train-00000.tokens   … heldout-00000.tokens …      documents sorted by domain, each followed by the end id
    heldout-00000.sizes  … the bytes of text that each held-out token covers, in the form of a shard
    tokenizer.json       a copy, unless the tokenizer is `bytes`, which needs no sizes either

`Prepared.train` and `Prepared.heldout` are `TokenStream`s: the shards of a split as one address space, in
which every domain is one contiguous range.
"""

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.account.text import is_account
from moetrain.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from moetrain.data.tokens.blocks import damaged
from moetrain.data.tokens.formats import how_to_read
from moetrain.data.tokens.shards import TokenShard, open_shard, write_file
from moetrain.errors import DataError
from moetrain.files import parse_json, read_bytes, reason

DESCRIPTION, TOKENS, SIZES = "dataset.json", ".tokens", ".sizes"
_MOST_BYTES = 64 << 20           # of a description, which has a hundred bytes a domain and shard
_FORMAT = 1
LARGEST_SIZE = 1 << 32           # bytes that one token covers


class TokenStream:
    """Tokens of several shards under one range of addresses from 0 on.

    `domain_bounds` is int64 [domains + 1]: domain d has tokens domain_bounds[d] to domain_bounds[d + 1].
    `document_starts` is int64 [documents], the address of each document's first token, ascending.

    Args:
        shards: the tokens.
        num_domains: domains of the dataset; some may have no token here.
        sizes: bytes of text that each token covers, as a stream of the same size.
        byte_ids: whether an id below 256 is a byte of text and any other id covers none.
    """

    def __init__(self, *, shards: list[TokenShard], num_domains: int, sizes: "TokenStream | None" = None,
                 byte_ids: bool = False) -> None:
        self._shards, self._sizes, self._byte_ids = shards, sizes, byte_ids
        lengths = [len(shard.tokens) for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.size = int(self._starts[-1])
        documents = [shard.offsets[:-1] + start for shard, start in zip(shards, self._starts)]
        self.document_starts = np.concatenate([np.zeros(0, np.int64), *documents]).astype(np.int64)
        self.document_domains = np.concatenate([np.zeros(0, np.int32),
                                                *(shard.document_domains for shard in shards)])
        if (np.diff(self.document_domains) < 0).any():
            raise DataError(13, "the documents of a prepared dataset are out of order",
                            where=str(shards[0].path.parent),
                            why="documents must be sorted by domain, over all shards",
                            next="prepare the text again with data=text")
        first = np.searchsorted(self.document_domains, np.arange(num_domains + 1))
        self.domain_bounds = np.append(self.document_starts, self.size)[first]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length` in the type of the files, uint16 or uint32."""
        assert 0 <= start <= start + length <= self.size, (start, length, self.size)
        pieces = []
        shard = int(np.searchsorted(self._starts, start, "right")) - 1
        while length > 0:
            offset = start - int(self._starts[shard])
            tokens = self._shards[shard].tokens
            piece = tokens.read(offset, min(offset + length, len(tokens)))
            pieces.append(piece)
            start, length, shard = start + len(piece), length - len(piece), shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])

    def text_bytes(self, start: int, length: int) -> int | None:
        """Bytes of text that tokens `start` to `start + length` cover; None if unknown."""
        if self._byte_ids:
            return int(np.count_nonzero(self.read(start, length) < 256))
        return None if self._sizes is None else int(self._sizes.read(start, length).sum(dtype=np.int64))

    def domain_range(self, domain: int) -> tuple[int, int]:
        """First address of a domain, and the one behind its last."""
        return int(self.domain_bounds[domain]), int(self.domain_bounds[domain + 1])


@dataclass(frozen=True)
class Prepared:
    """An open dataset folder: its description and the token streams of both splits."""

    folder: Path
    description: dict[str, Any]
    train: TokenStream
    heldout: TokenStream

    @property
    def fingerprint(self) -> str:
        return self.description["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.description["vocab_size"]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.description["domains"])

    @property
    def account(self) -> dict[str, Any] | None:
        """The account of the source. Datasets of older versions have none."""
        return self.description.get("account")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        if self.description["tokenizer"] == "bytes":
            return load_tokenizer("bytes")
        return load_tokenizer(str(self.folder / "tokenizer.json"), end_id=self.description["end_id"],
                              parse_special=self.description.get("parse_special", False))


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Complete a folder with its `dataset.json`.

    It lists every shard with the checksum of its header, which in turn holds all other checksums of the
    shard.
    """
    shards, sizes = ({path.name: open_shard(path, verify=False).header_crc
                      for path in sorted(folder.glob(f"*{suffix}"))}
                     for suffix in (TOKENS, SIZES))
    content = {"format": _FORMAT, **description, "shards": shards, "sizes": sizes}
    content["checksum"] = _checksum(content)
    write_file(folder / DESCRIPTION, json.dumps(content, indent=1, ensure_ascii=False).encode())


def open_prepared(path: Path, *, verify: bool) -> Prepared:
    """Open the dataset in a folder, or the one that a `.tokens` file belongs to.

    `verify` compares all tokens with their checksums now instead of at their first use.
    """
    if path.is_file():
        if path.name != DESCRIPTION:
            open_shard(path, verify=verify)                      # damage of this file is reported first
        path = path.parent
    description = _read_description(path)
    vocab_size = description["vocab_size"]
    shards = {name: _open_member(path, name, crc, description, vocab_size, verify)
              for name, crc in description["shards"].items()}
    sizes = {name: _open_member(path, name, crc, description, LARGEST_SIZE, verify)
             for name, crc in description.get("sizes", {}).items()}
    for name, found in sizes.items():
        _compare(found, shards[name.removesuffix(SIZES) + TOKENS])
    streams = {split: _stream(shards, sizes, split, description) for split in ("train", "heldout")}
    return Prepared(path, description, **streams)


def _stream(shards: dict[str, TokenShard], sizes: dict[str, TokenShard], split: str,
            description: dict[str, Any]) -> TokenStream:
    members, beside = ([files[name] for name in sorted(files) if name.startswith(f"{split}-")]
                       for files in (shards, sizes))
    domains = len(description["domains"])
    return TokenStream(shards=members, num_domains=domains, byte_ids=description["tokenizer"] == "bytes",
                       sizes=TokenStream(shards=beside, num_domains=domains) if beside else None)


def _open_member(folder: Path, name: str, crc: int, description: dict[str, Any], vocab_size: int,
                 verify: bool) -> TokenShard:
    path = folder / name
    shard = open_shard(path, verify=verify)
    for what, has, expected in (("checksum", shard.header_crc, crc),
                                ("vocab_size", shard.vocab_size, vocab_size),
                                ("domains", list(shard.domains), description["domains"])):
        if has != expected:
            raise damaged(12, path, "a token shard belongs to another dataset", 0,
                          f"its {what} is {has}, {DESCRIPTION} says {expected}")
    return shard


def _compare(sizes: TokenShard, shard: TokenShard) -> None:
    """Check that sizes have an entry for each token of the shard beside them."""
    if not np.array_equal(sizes.offsets, shard.offsets):
        raise damaged(12, sizes.path, "a token shard belongs to another dataset", 0,
                      f"its documents are not those of {shard.path.name}")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        raw = read_bytes(path, limit=_MOST_BYTES, links=False)
    except OSError as error:
        raise _no_description(path, error) from error
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise damaged(11, path, "the description of a dataset is damaged", getattr(error, "pos", 0),
                      reason(error)) from error
    problem = _description_problem(content)
    if problem:
        raise damaged(11, path, "the description of a dataset is damaged", 0, problem)
    return content


def _no_description(path: Path, error: OSError) -> DataError:
    """The error for a folder without `dataset.json`. One that holds shards was a dataset before."""
    if isinstance(error, FileNotFoundError) and next(path.parent.glob(f"*{TOKENS}"), None) is not None:
        return lost_description(path.parent)
    return DataError(10, "not a folder of prepared tokens", where=str(path), why=reason(error),
                     next=how_to_read(path.parent)
                     or "give the folder that data=text prepared (it holds dataset.json)")


def lost_description(folder: Path) -> DataError:
    """The error for a dataset folder whose `dataset.json` is gone."""
    return DataError(121, f"a prepared dataset has lost its {DESCRIPTION}", where=str(folder),
                     why="the other files of the dataset are there; without it nobody can tell whether "
                         "they are whole",
                     next=f"restore {DESCRIPTION}, or move the folder away: data=text prepares it again")


def _description_problem(content: Any) -> str | None:
    """What makes a description unusable, in words; None if nothing does."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return f"it is not a description of format {_FORMAT}"
    if content.pop("checksum", None) != _checksum(content):
        return "its checksum does not match"
    if not isinstance(content.get("fingerprint"), str) or not isinstance(content.get("tokenizer"), str):
        return "fingerprint or tokenizer is missing"
    vocab_size = content.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1 or not _strings(content.get("domains")):
        return "vocab_size or domains is missing"
    if not all(are_counts(content.get(split), content["domains"]) for split in ("train", "heldout")):
        return "the counts of a split are missing"
    if not isinstance(content.get("heldout_overlap", ""), float | None):
        return "heldout_overlap is missing"
    if "account" in content and not is_account(content["account"]):     # older datasets have none
        return "its account is no account"
    shards = content.get("shards")
    trained = any(counts["tokens"] for counts in content["train"].values())
    if not isinstance(shards, dict) or trained and not any(name.startswith("train-") for name in shards):
        return "it lists no training shard"
    if any("/" in name or "\\" in name or not name.endswith(TOKENS) for name in shards):
        return "it lists a shard outside its folder"
    return _sizes_problem(content.get("sizes", {}), shards)


def _sizes_problem(sizes: Any, shards: dict[str, Any]) -> str | None:
    """Check that sizes are listed for all shards of held-out text, or for none."""
    beside = {name.removesuffix(TOKENS) + SIZES for name in shards if name.startswith("heldout-")}
    if not isinstance(sizes, dict) or sizes and set(sizes) != beside:
        return "it lists sizes that do not belong to the held-out shards"
    return None


def _strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def are_counts(value: Any, domains: list[str]) -> bool:
    """Whether a value has documents, tokens and bytes of every domain, as SplitWriter counts them."""
    return isinstance(value, dict) and list(value) == domains and all(
        isinstance(counts, dict) and list(counts) == ["documents", "tokens", "bytes"]
        and all(type(number) is int for number in counts.values()) for counts in value.values())


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def total(counts: dict[str, dict[str, int]],
          what: Iterable[str] = ("documents", "tokens", "bytes")) -> dict[str, int]:
    """Sums of counts over domains."""
    return {name: sum(domain[name] for domain in counts.values()) for name in what}

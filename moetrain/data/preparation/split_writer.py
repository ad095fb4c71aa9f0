"""Writer of the token shards of one split, document by document.

After a kill it can continue behind the last finished shard:

    train.resume         while a split is written: its finished shards, and the counts of their documents
"""

import json
import logging
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.preparation.prepared_dataset import LARGEST_SIZE, SIZES, TOKENS, are_counts, total
from moetrain.data.tokens.shards import TokenShard, open_shard, token_dtype, write_file, write_shard
from moetrain.errors import DataError
from moetrain.files import read_json, reason

log = logging.getLogger(__name__)

SHARD_TOKENS = 32 << 20
_READ = 1 << 20                  # tokens read at once
_MOST_BYTES = 64 << 20           # of a list of finished shards, which has two hundred a domain and shard


class SplitWriter:
    """Writer of documents, domain by domain, into shards. A document longer than a shard is cut.

    Args:
        folder: folder of the shards.
        split: beginning of their names.
        vocab_size: vocabulary of the tokens.
        domains: names of all domains.
        shard_tokens: tokens of a shard at most; None for SHARD_TOKENS.
        sizes: whether the bytes that each token covers come with the tokens and are written beside each
            shard.
        resumable: whether to continue behind the shards in the folder; `written` counts their documents.
            Unfinished shards are removed.
        suffix: suffix of the shards.
    """

    def __init__(self, *, folder: Path, split: str, vocab_size: int, domains: tuple[str, ...],
                 shard_tokens: int | None = None, sizes: bool = False, resumable: bool = False,
                 suffix: str = TOKENS) -> None:
        assert not (sizes and resumable), split
        self._folder, self._split, self._suffix = folder, split, suffix
        self._vocab_size, self._domains = vocab_size, domains
        self._sizes = SplitWriter(folder=folder, split=split, vocab_size=LARGEST_SIZE, domains=domains,
                                  shard_tokens=shard_tokens, suffix=SIZES) if sizes else None
        self._resume = folder / f"{split}.resume" if resumable else None
        self._tokens = np.empty(shard_tokens or SHARD_TOKENS, token_dtype(vocab_size))
        self._filled = 0                             # tokens in the buffer
        self._offsets = array("q", [0])              # of whole documents, then the start of the current one
        self._document_domains = array("i")
        self._text_bytes = 0                         # of whole documents
        self._under_way = 0                          # tokens of the current document
        self._finished: dict[str, int] = {}          # shards, with the checksums of their headers
        self.counts = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in domains}
        if self._resume is not None:
            self._go_on()
            self._remove_others()
        self.written = total(self.counts)["documents"]

    def add(self, tokens: np.ndarray, domain: int, text_bytes: int) -> None:
        """Write a whole document.

        Args:
            tokens: its ids, end id included.
            domain: index of its domain.
            text_bytes: bytes of its text.
        """
        self.extend(tokens, domain)
        self.end_document(domain, text_bytes)

    def extend(self, tokens: np.ndarray, domain: int, sizes: np.ndarray | None = None) -> None:
        """Write tokens of the current document.

        Args:
            tokens: the ids.
            domain: index of the document's domain.
            sizes: bytes of text that each token covers, for a writer with `sizes`.
        """
        if self._sizes is not None:
            assert sizes is not None and len(sizes) == len(tokens), (sizes, tokens)
            self._sizes.extend(sizes, domain)
        self._under_way += len(tokens)
        while len(tokens):
            if self._filled == len(self._tokens):
                self._make_room(domain)
            taken = tokens[:len(self._tokens) - self._filled]
            self._tokens[self._filled:self._filled + len(taken)] = taken
            self._filled, tokens = self._filled + len(taken), tokens[len(taken):]

    def end_document(self, domain: int, text_bytes: int) -> None:
        """End the current document, of `text_bytes` bytes of text."""
        if self._sizes is not None:
            self._sizes.end_document(domain, text_bytes)
        if self._filled > self._offsets[-1]:
            self._close(domain)
        self._text_bytes += text_bytes
        for name, number in (("documents", 1), ("tokens", self._under_way), ("bytes", text_bytes)):
            self.counts[self._domains[domain]][name] += number
        self._under_way = 0

    def flush(self) -> None:
        """Write what is pending. Called once, at the end."""
        if self._sizes is not None:
            self._sizes.flush()
        if self._document_domains:
            self._write()
        if self._resume is not None:
            self._resume.unlink(missing_ok=True)

    def finished(self) -> Iterator[np.ndarray]:
        """Yield the tokens of the finished shards in blocks."""
        for name in self._finished:
            tokens = open_shard(self._folder / name, verify=False).tokens
            for start in range(0, len(tokens), _READ):
                yield tokens.read(start, min(start + _READ, len(tokens)))

    def _close(self, domain: int) -> None:
        self._offsets.append(self._filled)
        self._document_domains.append(domain)

    def _make_room(self, domain: int) -> None:
        """Write the full shard.

        The current document moves to the next shard, or is cut if it fills this one alone.
        """
        if self._document_domains:                   # the current document goes to the next shard
            self._write()
            if self._resume is not None:
                write_file(self._resume,
                           json.dumps({"shards": self._finished, "counts": self.counts}).encode())
        else:                                        # it fills this one alone
            self._close(domain)
            self._write()

    def _write(self) -> None:
        path, end = self._folder / f"{self._split}-{len(self._finished):05d}{self._suffix}", self._offsets[-1]
        write_shard(path, tokens=self._tokens[:end], offsets=self._offsets,
                    document_domains=self._document_domains, vocab_size=self._vocab_size,
                    domains=self._domains, text_bytes=self._text_bytes)
        self._finished[path.name] = open_shard(path, verify=False).header_crc
        self._filled -= end
        self._tokens[:self._filled] = self._tokens[end:end + self._filled]
        self._offsets, self._document_domains, self._text_bytes = array("q", [0]), array("i"), 0

    def _go_on(self) -> None:
        """Take over shards and counts of a killed preparation if all of them are whole."""
        try:
            found = read_json(self._resume, limit=_MOST_BYTES)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("a preparation begins anew: what an earlier one has left cannot be read (%s)",
                        reason(error))
            return
        if (not isinstance(found, dict) or not are_counts(found.get("counts"), list(self._domains))
                or not self._whole(found.get("shards"))):
            log.warning("a preparation begins anew: the shards that an earlier one has left are damaged")
            return
        self._finished, self.counts = found["shards"], found["counts"]

    def _whole(self, shards: Any) -> bool:
        """Whether the listed shards are there, undamaged and of this split."""
        if not isinstance(shards, dict):
            return False
        if list(shards) != [f"{self._split}-{number:05d}{self._suffix}" for number in range(len(shards))]:
            return False
        try:
            found = {name: open_shard(self._folder / name, verify=True) for name in shards}
        except DataError:
            return False
        return all(self._is_ours(shard) and shard.header_crc == shards[name] for name, shard in found.items())

    def _is_ours(self, shard: TokenShard) -> bool:
        return shard.vocab_size == self._vocab_size and shard.domains == self._domains

    def _remove_others(self) -> None:
        """Remove shards that were not finished or not counted."""
        for path in self._folder.glob(f"{self._split}-*{self._suffix}"):
            if path.name not in self._finished:
                path.unlink()

"""Training and evaluation windows over prepared tokens.

A domain's documents lie end to end, each closed by the end id. Training windows of seq_len + 1 tokens start every
seq_len tokens, so each token but a domain's first is a target once an epoch; what is left at the end of a domain is not
trained on. Sample id = number of the window, over all domains.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np

from moetrain.config.suggest import nearest
from moetrain.config.values import show
from moetrain.data.batch import DOMAIN_IDS, HELDOUT_IDS, Batch, make_batch
from moetrain.data.order import mixture_order
from moetrain.data.prepared import Prepared, TokenStream
from moetrain.errors import DataError


class Windows(NamedTuple):
    """Windows of a stream: window i has inputs starts[i] … and lengths[i] targets, one token further."""

    starts: np.ndarray
    lengths: np.ndarray


class TokenDataset:
    """A prepared dataset, cut into windows.

    Args:
        prepared: the tokens.
        seq_len: targets of a window.
        global_batch: windows of a step.
        seed: seed of the order.
        mixture: `proportional` (domains by their size) or `uniform` (each alike).
        weights: how many times as often as the mixture alone has it a domain comes, 1 unless given; 0 leaves it out.
        mask_documents: number the documents inside a window.
    """

    def __init__(self, *, prepared: Prepared, seq_len: int, global_batch: int, seed: int, mixture: str = "proportional",
                 weights: Mapping[str, float] | None = None, mask_documents: bool = False) -> None:
        self.vocab_size, self.domains, self.fingerprint = prepared.vocab_size, prepared.domains, prepared.fingerprint
        self.tokenizer = prepared.tokenizer
        self.train_stream, self.heldout_stream = prepared.train, prepared.heldout
        self._seq_len, self._global_batch, self._mask_documents = seq_len, global_batch, mask_documents
        weight = self._weights(prepared.folder, weights or {})
        tokens = np.diff(self.train_stream.domain_bounds)
        sizes = np.maximum(tokens - 1, 0) // seq_len
        self._refuse_too_short(prepared.folder, tokens, sizes, mixture, weight)
        self._first_window = np.concatenate([[0], np.cumsum(sizes)])
        self._order = mixture_order(mixture, key=(seed, self.fingerprint), sizes=sizes.tolist(), weights=weight)

    @property
    def windows(self) -> int:
        """Training windows of all domains: an epoch of the proportional mixture."""
        return int(self._first_window[-1])

    def sample_ids(self, step: int, slots: range | np.ndarray) -> np.ndarray:
        assert step >= 1, step
        return self._order.windows((step - 1) * self._global_batch + np.asarray(slots, np.int64))

    def batch(self, sample_ids: np.ndarray) -> Batch:
        sample_ids = np.asarray(sample_ids, np.int64)
        assert ((sample_ids >= 0) & (sample_ids < self.windows)).all(), (sample_ids, self.windows)
        domains = np.searchsorted(self._first_window, sample_ids, "right") - 1
        starts = self.train_stream.domain_bounds[domains] + (sample_ids - self._first_window[domains]) * self._seq_len
        windows = Windows(starts, np.full(len(starts), self._seq_len))
        return self._read(self.train_stream, windows, sample_ids, domains)

    def heldout(self, domain: int, *, windows: int, batch: int) -> Iterator[Batch]:
        chosen = self.heldout_windows(domain, windows)
        ids = HELDOUT_IDS + domain * DOMAIN_IDS + chosen.starts - self.heldout_stream.domain_range(domain)[0]
        for first in range(0, len(ids), batch):
            part = slice(first, first + batch)
            piece = Windows(chosen.starts[part], chosen.lengths[part])
            yield self._read(self.heldout_stream, piece, ids[part], np.full(len(ids[part]), domain))

    def heldout_windows(self, domain: int, windows: int) -> Windows:
        """At most `windows` windows that do not overlap, spread evenly; all of a short domain, the last one padded."""
        start, end = self.heldout_stream.domain_range(domain)
        targets = max(end - start - 1, 0)
        full = targets // self._seq_len
        if full >= windows:
            numbers = np.arange(windows, dtype=np.int64) * full // max(windows, 1)
        else:
            numbers = np.arange(-(-targets // self._seq_len), dtype=np.int64)
        return Windows(start + numbers * self._seq_len, np.minimum(targets - numbers * self._seq_len, self._seq_len))

    def bytes_of_targets(self, batch: Batch) -> int:
        if self.tokenizer is None:                   # ids that nobody can read: a token counts as a byte
            return int(batch.valid_BS.sum())
        if self.tokenizer.identity == "bytes":
            return int((batch.valid_BS & (batch.targets_BS < 256)).sum())
        rows = (targets[valid].tolist() for targets, valid in zip(batch.targets_BS, batch.valid_BS))
        return sum(len(self.tokenizer.decode(row).encode()) for row in rows)

    def _read(self, stream: TokenStream, windows: Windows, sample_ids: np.ndarray, domains: np.ndarray) -> Batch:
        rows = np.zeros((len(windows.starts), self._seq_len + 1), np.int64)
        for row, start, length in zip(rows, windows.starts.tolist(), windows.lengths.tolist()):
            row[:length + 1] = stream.read(start, length + 1)
        documents = self._documents(stream, windows.starts) if self._mask_documents else None
        return make_batch(rows, windows.lengths, sample_ids, domains, documents)

    def _documents(self, stream: TokenStream, starts: np.ndarray) -> np.ndarray:
        positions_BS = starts[:, None] + np.arange(self._seq_len)
        documents_BS = np.searchsorted(stream.document_starts, positions_BS, "right")
        return documents_BS - documents_BS[:, :1]

    def _weights(self, folder: Path, weights: Mapping[str, float]) -> list[float]:
        """The weight of every domain."""
        if unknown := sorted(set(weights) - set(self.domains)):
            near = nearest(unknown[0], self.domains) or list(self.domains[:8])
            renamed = {near[0] if name == unknown[0] else name: weight for name, weight in weights.items()}
            raise DataError(100, "data.weights names a domain that the data does not have", where=f"{folder} (data.weights)",
                            why=f"there is no {', '.join(unknown[:8])}; the domains are {', '.join(self.domains[:20])}",
                            next=quote(f"data.weights={show(renamed)}"))
        return [float(weights.get(domain, 1)) for domain in self.domains]

    def _refuse_too_short(self, folder: Path, tokens: np.ndarray, sizes: np.ndarray, mixture: str,
                          weights: list[float]) -> None:
        """Proportional needs one window somewhere, uniform one in every domain that has training text and a weight."""
        used = (tokens > 0) & (np.array(weights) > 0)
        if used.any() and (sizes[used].all() if mixture == "uniform" else sizes[used].any()):
            return
        if not used.any():
            raise DataError(101, "no domain is left to train on", where=f"{folder} (data.weights)",
                            why="every domain with training text has the weight 0", next="~data.weights")
        domain = int(np.argmin(np.where(used, tokens, tokens.max())) if mixture == "uniform" else np.argmax(tokens * used))
        limit, name = int(tokens[domain]) - 1, self.domains[domain]
        remedy = f"train.seq_len={limit} or less" if limit > 0 else "give more text (data.path)"
        raise DataError(50, "a sequence is longer than the training text", where=f"{folder}, domain {name}",
                        why=f"train.seq_len={self._seq_len} needs {self._seq_len + 1:,} tokens, the domain has "
                            f"{limit + 1:,} (data.mixture={mixture})", next=remedy)

"""Training and evaluation windows over prepared tokens.

The documents of a domain lie end to end, each closed by the end id, and so do the domains. Every token is the
target of a window once an epoch (windows.py, order.py). mixture.py says which domains are read together and
how often. Held-out text is cut into windows by the parts of evaluated_domains.py.

A sample id is the number of a window; that of a held-out one is HELDOUT_IDS + DOMAIN_IDS * part + its first
target in that part.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote

import numpy as np

from moetrain.config.suggest import nearest
from moetrain.config.values import show
from moetrain.data.batches.batch import DOMAIN_IDS, HELDOUT_IDS, Batch, make_batch
from moetrain.data.batches.evaluated_domains import measured_parts
from moetrain.data.batches.mixture import Group, mixture_groups
from moetrain.data.batches.order import ORDER, Order
from moetrain.data.batches.windows import Piece, Windows
from moetrain.data.preparation.prepared_dataset import Prepared, TokenStream
from moetrain.errors import DataError


class TokenDataset:
    """Windows over a prepared dataset.

    Args:
        prepared: the tokens.
        seq_len: targets of a window.
        global_batch: windows of a step.
        seed: seed of the order.
        mixture: `proportional` (domains by their size) or `uniform` (each alike).
        weights: factor on how often the mixture reads a domain, by its name; 1 unless given, 0 leaves it out.
        mask_documents: whether to number the documents inside a window.
        trains: whether there are training windows; otherwise only held-out ones may be read.
    """

    order = ORDER

    def __init__(self, *, prepared: Prepared, seq_len: int, global_batch: int, seed: int,
                 mixture: str = "proportional", weights: Mapping[str, float] | None = None,
                 mask_documents: bool = False, trains: bool = True) -> None:
        self.vocab_size, self.domains = prepared.vocab_size, prepared.domains
        self.fingerprint, self.tokenizer = prepared.fingerprint, prepared.tokenizer
        self.account = getattr(prepared, "account", None)        # pre-tokenized data has none
        self.train_stream, self.heldout_stream = prepared.train, prepared.heldout
        self._seq_len, self._global_batch, self._mask_documents = seq_len, global_batch, mask_documents
        self._groups = self._mixture(prepared.folder, mixture, weights or {}) if trains else []
        self._windows = Windows(_ranges(self.train_stream, [group.domains for group in self._groups]),
                                seq_len=seq_len, wraps=len(self._groups) > 1)
        self._order = None
        if trains:
            self._order = Order(key=(seed, self.fingerprint), sizes=self._windows.sizes.tolist(),
                                shares=[group.share for group in self._groups], seq_len=seq_len,
                                global_batch=global_batch)
        parts = measured_parts(self.domains, np.diff(self.heldout_stream.domain_bounds).tolist())
        self.measured = tuple(part.name for part in parts)
        self._heldout = Windows(_ranges(self.heldout_stream, [part.domains for part in parts]),
                                seq_len=seq_len, wraps=False)

    @property
    def tokens(self) -> int:
        """Tokens of an epoch, each trained on once."""
        return int(self._windows.tokens.sum())

    def epochs(self, sequences: int) -> np.ndarray:
        rows = np.array([group.share for group in self._groups], float)
        by_group = sequences * rows / rows.sum() * self._seq_len / self._windows.sizes
        found = np.zeros(len(self.domains))
        for group, epochs in zip(self._groups, by_group):
            found[group.domains] = epochs
        found[np.diff(self.train_stream.domain_bounds) == 0] = 0
        return found

    def sample_ids(self, step: int, slots: range | np.ndarray) -> np.ndarray:
        assert step >= 1 and self._order is not None, step
        indices = (step - 1) * self._global_batch + np.asarray(slots, np.int64)
        return self._windows.numbers(*self._order.windows(indices))

    def batch(self, sample_ids: np.ndarray) -> Batch:
        """Training windows or held-out ones, by sample id."""
        sample_ids = np.asarray(sample_ids, np.int64)
        return self._read(self._stream_of(sample_ids),
                          [self.pieces(number) for number in sample_ids.tolist()], sample_ids)

    def pieces(self, sample_id: int) -> list[Piece]:
        """Ranges of a window's targets, in the training or the held-out stream."""
        if sample_id >= HELDOUT_IDS:
            return self._heldout.pieces_at(*divmod(sample_id - HELDOUT_IDS, DOMAIN_IDS))
        assert 0 <= sample_id < self._windows.count, (sample_id, self._windows.count)
        return self._windows.pieces(sample_id)

    def heldout_ids(self, part: int, windows: int) -> np.ndarray:
        """Ids of at most `windows` windows of a part that do not overlap, spread evenly.

        A part with fewer gives all of them; its last one is not full.
        """
        full, rest = divmod(int(self._heldout.tokens[part]), self._seq_len)
        if full >= windows:
            numbers = np.arange(windows) * full // max(windows, 1)
        else:
            numbers = np.arange(full + bool(rest))
        return HELDOUT_IDS + part * DOMAIN_IDS + numbers.astype(np.int64) * self._seq_len

    def heldout(self, part: int, *, windows: int, batch: int) -> Iterator[Batch]:
        """Yield held-out windows of measured[part] in batches of at most `batch`."""
        ids = self.heldout_ids(part, windows)
        for first in range(0, len(ids), batch):
            yield self.batch(ids[first:first + batch])

    def bytes_of_targets(self, batch: Batch) -> int | None:
        sample_ids = batch.sample_ids_B[batch.valid_BS.any(1)].numpy()       # without padding
        stream = self._stream_of(sample_ids)
        found = [stream.text_bytes(*piece) for number in sample_ids.tolist() for piece in self.pieces(number)]
        return None if None in found else sum(found)

    def _stream_of(self, sample_ids: np.ndarray) -> TokenStream:
        held = sample_ids >= HELDOUT_IDS
        assert held.all() or not held.any(), sample_ids
        return self.heldout_stream if held.any() else self.train_stream

    def _read(self, stream: TokenStream, rows: list[list[Piece]], sample_ids: np.ndarray) -> Batch:
        inputs, targets = (np.zeros((len(rows), self._seq_len), np.int64) for _ in range(2))
        documents = np.zeros_like(inputs) if self._mask_documents else None
        for number, pieces in enumerate(rows):
            at = 0
            for start, length in pieces:
                tokens = _with_the_one_before(stream, start, length)
                inputs[number, at:at + length], targets[number, at:at + length] = tokens[:-1], tokens[1:]
                at += length
            if documents is not None:
                documents[number, :at] = self._documents(stream, pieces)
        lengths = np.array([sum(length for _, length in pieces) for pieces in rows], np.int64)
        domains = np.array([_main_domain(stream, pieces) for pieces in rows], np.int64)
        return make_batch(inputs, targets, lengths, sample_ids, domains, documents)

    def _documents(self, stream: TokenStream, pieces: Sequence[Piece]) -> np.ndarray:
        """Number of each input's document, from 0 in order of appearance.

        A document that appears again behind something else counts as another.
        """
        places = np.concatenate([np.arange(start, start + length) for start, length in pieces]) - 1
        documents = np.searchsorted(stream.document_starts, places % stream.size, "right")
        another = (np.diff(documents) != 0) | (np.diff(places) != 1)
        return np.concatenate([[0], np.cumsum(another)])

    def _mixture(self, folder: Path, mixture: str, weights: Mapping[str, float]) -> list[Group]:
        """Groups that are trained on. DataError if there is none."""
        if unknown := sorted(set(weights) - set(self.domains)):
            near = nearest(unknown[0], self.domains) or list(self.domains[:8])
            renamed = {near[0] if name == unknown[0] else name: weight for name, weight in weights.items()}
            raise DataError(100, "data.weights names a domain that the data does not have",
                            where=f"{folder} (data.weights)",
                            why=f"there is no {', '.join(unknown[:8])}; the domains are "
                                f"{', '.join(self.domains[:20])}",
                            next=quote(f"data.weights={show(renamed)}"))
        if not self.train_stream.size:
            raise DataError(50, "there is nothing to train on", where=str(folder),
                            why="its training split has no token", next="give more text (data.path)")
        groups = mixture_groups(mixture, tokens=np.diff(self.train_stream.domain_bounds).tolist(),
                                seq_len=self._seq_len,
                                weights=[float(weights.get(domain, 1)) for domain in self.domains])
        if not groups:
            raise DataError(101, "no domain is left to train on", where=f"{folder} (data.weights)",
                            why="every domain with training text has the weight 0", next="~data.weights")
        return groups


def _ranges(stream: TokenStream, groups: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Ranges of the domains of each group in the stream."""
    return [[stream.domain_range(domain) for domain in domains] for domains in groups]


def _with_the_one_before(stream: TokenStream, start: int, length: int) -> np.ndarray:
    if start:
        return stream.read(start - 1, length + 1)
    return np.concatenate([stream.read(stream.size - 1, 1), stream.read(0, length)])


def _main_domain(stream: TokenStream, pieces: Sequence[Piece]) -> int:
    """Domain of most targets of a window, of equal ones the first; 0 without targets."""
    found: dict[int, int] = {}
    for start, length in pieces:
        first, last = (int(np.searchsorted(stream.domain_bounds, place, "right")) - 1
                       for place in (start, start + length - 1))
        for domain in range(first, last + 1):
            begin, end = stream.domain_range(domain)
            found[domain] = found.get(domain, 0) + min(end, start + length) - max(begin, start)
    return max(found, key=found.get, default=0)

"""Interpolated Witten-Bell n-gram models: a baseline of the same training text and held-out targets.

    P_k(w | c) = (n(c, w) + T(c) * P_{k-1}(w | c')) / (n(c) + T(c))        P_{-1} = 1 / vocabulary

Order k has k tokens of context c; c' drops the oldest; n counts, T(c) is the number of different
tokens after c. Where c was never seen, P_k = P_{k-1}. Witten and Bell, 1991, in the interpolated
form of Chen and Goodman, 1999.

One model serves all domains. The n-gram sees the tokens before a held-out window, which the network does not:
a small advantage of the baseline. Counting sorts codes of (context, token) block by block, so memory grows
with the number of different n-grams, not with the text.
"""

from typing import NamedTuple

import numpy as np

from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.preparation.prepared_dataset import TokenStream

_CHUNK = 1 << 22
_INT64_MAX = (1 << 63) - 1


class Counts(NamedTuple):
    """Counts n(c, w) of one order."""

    codes: np.ndarray   # context * vocabulary + token, ascending
    counts: np.ndarray  # how often each code occurs


def witten_bell(dataset: TokenDataset, *, windows: int, batch: int, order: int) -> dict[str, list[float]]:
    """Train n-gram models and measure them on the held-out windows.

    Args:
        dataset: text to train on, and held-out windows.
        windows: number of windows of each domain, as in the network's evaluation.
        batch: windows in one forward pass, as in the network's evaluation.
        order: largest order.

    Returns:
        Nats per byte of text by domain, a value for each order from 0 on. Domains without held-out windows,
        or whose number of bytes is unknown, are left out.
    """
    measured = {}
    for part, name in enumerate(dataset.measured):
        sizes = [dataset.bytes_of_targets(found)
                 for found in dataset.heldout(part, windows=windows, batch=batch)]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes) and sum(known) > 0:
            measured[name] = (_positions(dataset, part, windows), sum(known))
    if not measured:
        return {}
    nats = _nats(dataset, np.concatenate([positions for positions, _ in measured.values()]), order)
    ends = np.cumsum([len(positions) for positions, _ in measured.values()])[:-1]
    by_domain = np.split(nats, ends, axis=1)
    return {name: (part.sum(1) / size).tolist()
            for (name, (_, size)), part in zip(measured.items(), by_domain)}


def mean_over_domains(result: dict[str, list[float]]) -> list[float]:
    """Mean over domains, each of the same weight; a value for each order."""
    return np.mean(list(result.values()), 0).tolist() if result else []


def _positions(dataset: TokenDataset, part: int, windows: int) -> np.ndarray:
    """Positions of a domain's targets in the held-out stream."""
    pieces = (piece for number in dataset.heldout_ids(part, windows).tolist()
              for piece in dataset.pieces(number))
    return np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(start, start + length) for start, length in pieces)])


def _nats(dataset: TokenDataset, positions: np.ndarray, order: int) -> np.ndarray:
    """Compute -log P of every target at every order: [order + 1, targets]."""
    vocab, heldout = dataset.vocab_size, dataset.heldout_stream
    firsts = _domain_starts(heldout, positions)
    history = _history(heldout, positions, order)
    probability = np.full(len(positions), 1.0 / vocab)
    nats = np.empty((order + 1, len(positions)))
    for k in range(order + 1):
        counts = count(dataset.train_stream, k, vocab)
        # Near the start of a domain the context is shorter: keep the order below.
        known = positions - firsts >= k
        contexts = _contexts(history[order - k:order], vocab)
        better = interpolate(counts, contexts, history[order], probability, vocab)
        probability = np.where(known, better, probability)
        nats[k] = -np.log(probability)
    return nats


def interpolate(counts: Counts, contexts: np.ndarray, tokens: np.ndarray, lower: np.ndarray,
                vocab: int) -> np.ndarray:
    """Compute P_k from P_{k-1}.

    Args:
        counts: n-grams of order k.
        contexts: int64 [n], code of each context.
        tokens: int64 [n], the token after each.
        lower: float64 [n], P_{k-1}.
        vocab: size of the vocabulary.

    Returns:
        float64 [n], P_k.
    """
    cumulative = np.concatenate([[0], np.cumsum(counts.counts)])
    begin = np.searchsorted(counts.codes, contexts * vocab)
    end = np.searchsorted(counts.codes, contexts * vocab + (vocab - 1), "right")
    total, types = cumulative[end] - cumulative[begin], end - begin
    code = contexts * vocab + tokens
    place = np.searchsorted(counts.codes, code).clip(max=len(counts.codes) - 1)
    seen = np.where(counts.codes[place] == code, counts.counts[place], 0)
    return np.where(total > 0, (seen + types * lower) / np.maximum(total + types, 1), lower)


def count(stream: TokenStream, order: int, vocab: int) -> Counts:
    """Count all n-grams of a stream, block by block.

    Args:
        stream: tokens.
        order: number of tokens of context.
        vocab: size of the vocabulary.
    """
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, stream.size - order, _CHUNK):
        length = min(_CHUNK, stream.size - order - start)
        tokens = stream.read(start, length + order).astype(np.int64)
        columns = [tokens[shift:shift + length] for shift in range(order)]
        found = np.sort(_contexts(columns, vocab, length) * vocab + tokens[order:])
        codes, counts = _merge(codes, counts, found)
    return Counts(codes, counts)


def _merge(codes: np.ndarray, counts: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add the sorted codes of one more block to the counts."""
    first = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]]))
    new_counts = np.diff(np.append(first, len(found)))
    if not len(codes):
        return found[first], new_counts
    merged = np.concatenate([codes, found[first]])
    by_code = np.argsort(merged, kind="stable")
    merged, summed = merged[by_code], np.concatenate([counts, new_counts])[by_code]
    first = np.flatnonzero(np.concatenate([[True], merged[1:] != merged[:-1]]))
    return merged[first], np.add.reduceat(summed, first)


def _contexts(columns: list[np.ndarray] | np.ndarray, vocab: int,
              length: int | None = None) -> np.ndarray:
    """Encode every context as a number below 2^63 / vocab: exactly while vocab^k fits, else as a hash."""
    space = _INT64_MAX // vocab
    size = length if length is not None else np.shape(columns)[1]
    if vocab ** len(columns) <= space:
        context = np.zeros(size, np.int64)
        for column in columns:
            context = context * vocab + column
        return context
    mixed = np.zeros(size, np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
    return (mixed % np.uint64(space)).astype(np.int64)


def _history(stream: TokenStream, positions: np.ndarray, order: int) -> np.ndarray:
    """Tokens at position - order, …, position: [order + 1, targets], 0 before the stream begins."""
    tokens = stream.read(0, stream.size).astype(np.int64)
    shifted = positions[None, :] - np.arange(order, -1, -1)[:, None]
    return np.where(shifted >= 0, tokens[shifted.clip(min=0)], 0)


def _domain_starts(stream: TokenStream, positions: np.ndarray) -> np.ndarray:
    domains = np.searchsorted(stream.domain_bounds, positions, "right") - 1
    return stream.domain_bounds[domains]

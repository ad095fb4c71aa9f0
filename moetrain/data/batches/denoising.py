"""UL2's mixture of denoisers over the windows of a dataset, as one decoder-only sequence each.

    mode r, x    mode  text with a sentinel in place of each span | sentinel, span, sentinel, span, ..., last
    mode s       mode  beginning of the text                      | end of the text

Only what is behind the bar is scored: its tokens are the targets. Attention is causal throughout, and the
same model continues text. Ids behind those of the data, V:

    V, V + 1, V + 2    modes r, s, x
    V + 3 + i          sentinel of the i-th span of a sequence; the one after the last span closes it

The text of a window is its targets, as many of them from the beginning as fit into train.seq_len + 1 tokens
with mode and sentinels; the rest is left out. A window is corrupted by one denoiser, drawn by the rates. The
spans are T5's: noise and the rest are each divided at random into as many parts as there are spans, none
empty, which alternate and begin with the rest. In mode s the length of the end is uniform from 1 to twice its
mean. All draws are keyed by (seed, sample id), so every mesh and every epoch sees a window corrupted alike.

Held-out windows stay as they are: their loss is that of plain text, whatever was trained on.

Differences from UL2 (arXiv 2205.05131) and T5: no encoder, so inputs and targets share one length and one
causal attention; the sequence ends with one more sentinel instead of an end token; sentinels count upwards.

Shapes: B windows, S positions.
"""

from collections.abc import Mapping

import numpy as np

from moetrain.config.denoisers import MODES, Denoiser, denoiser_of, longest, noise_and_spans, special_ids
from moetrain.data.batches.batch import HELDOUT_IDS, Batch, Dataset, make_batch
from moetrain.data.batches.permutation import philox


class DenoisedDataset:
    """Dataset whose training windows are corrupted.

    Args:
        dataset: the windows; documents must not be masked.
        rates: share of each denoiser in the windows, by name, in any scale.
        seq_len: S.
        seed: seed of the corruption.
    """

    def __init__(self, dataset: Dataset, *, rates: Mapping[str, float], seq_len: int, seed: int) -> None:
        self._dataset, self._seq_len, self._seed = dataset, seq_len, seed
        self.denoisers = [denoiser_of(name) for name in rates]
        shares = np.array(list(rates.values()))
        self._cumulative = (shares / shares.sum()).cumsum()
        self._first_id = dataset.vocab_size
        self.vocab_size = dataset.vocab_size + special_ids(rates, seq_len)
        self.domains, self.measured, self.tokens = dataset.domains, dataset.measured, dataset.tokens
        self.fingerprint, self.order = dataset.fingerprint, f"{dataset.order} denoising-1"
        self.tokenizer = getattr(dataset, "tokenizer", None)
        self.account = getattr(dataset, "account", None)

    def sample_ids(self, step: int, slots: range | np.ndarray) -> np.ndarray:
        return self._dataset.sample_ids(step, slots)

    def heldout_ids(self, part: int, windows: int) -> np.ndarray:
        return self._dataset.heldout_ids(part, windows)

    def bytes_of_targets(self, batch: Batch) -> int | None:
        return self._dataset.bytes_of_targets(batch)

    def epochs(self, sequences: int) -> np.ndarray:
        return self._dataset.epochs(sequences)

    def batch(self, sample_ids: np.ndarray) -> Batch:
        """The windows, corrupted unless they are held out."""
        plain = self._dataset.batch(sample_ids)
        if (np.asarray(sample_ids) >= HELDOUT_IDS).all():
            return plain
        assert plain.documents_BS is None, "a corrupted window has no order of documents to mask"
        inputs, targets = (np.zeros(plain.tokens_BS.shape, np.int64) for _ in range(2))
        lengths = np.zeros(len(inputs), np.int64)
        for row, (sample, text, many) in enumerate(zip(
                sample_ids, plain.targets_BS.numpy(), plain.valid_BS.sum(1).tolist())):
            if many:
                sequence, scored = self._corrupted(int(sample), text[:many])
                lengths[row] = len(sequence) - 1
                inputs[row, :lengths[row]] = sequence[:-1]
                targets[row, :lengths[row]] = np.where(np.arange(1, len(sequence)) >= scored, sequence[1:],
                                                       -1)
        return make_batch(inputs, targets, lengths, plain.sample_ids_B.numpy(), plain.domains_B.numpy(), None)

    def _corrupted(self, sample: int, text: np.ndarray) -> tuple[np.ndarray, int]:
        """The sequence of a window, and the place of its first scored token."""
        assert (text >= 0).all(), "every token of a window that is corrupted is one of its targets"
        draws = philox(self._seed, "denoising", sample).random_raw(2 + len(text))
        share, place = (draws[:2] >> np.uint64(11)) * 2.0 ** -53
        denoiser = self.denoisers[min(np.searchsorted(self._cumulative, share, "right"),
                                      len(self.denoisers) - 1)]
        text = text[:longest(denoiser, self._seq_len + 1)]
        mode = [self._first_id + MODES.index(denoiser.mode)]
        if denoiser.mode == "s" or len(text) < 2:
            most = min(max((2 * len(text) * 2 * denoiser.percent + 100) // 200, 1), max(len(text) - 1, 1))
            end = 1 + int(place * most)
            return np.concatenate([mode, text]), 1 + len(text) - end
        return _with_sentinels(mode, text, spans_of(denoiser, len(text), draws[2:]),
                               self._first_id + len(MODES))


def spans_of(denoiser: Denoiser, length: int, draws: np.ndarray) -> np.ndarray:
    """Draw the spans that are corrupted, int64 [spans, 2]: first token and end.

    Args:
        denoiser: of mode r or x.
        length: tokens of the text.
        draws: uint64 random numbers, at least length - 2.
    """
    noise, spans = noise_and_spans(denoiser, length)
    noisy = _parts(noise, spans, draws[:noise - 1])
    kept = _parts(length - noise, spans, draws[noise - 1:length - 2])
    ends = (kept + noisy).cumsum()
    return np.stack([ends - noisy, ends], 1)


def _parts(items: int, parts: int, draws: np.ndarray) -> np.ndarray:
    """Divide items into parts, none empty, every division as likely: by the cuts of the smallest draws."""
    cuts = np.sort(np.argsort(draws, kind="stable")[:parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


def _with_sentinels(mode: list[int], text: np.ndarray, spans: np.ndarray,
                    first: int) -> tuple[np.ndarray, int]:
    """Move spans behind the text, each behind its sentinel, which also takes its place; `first` is an id."""
    given, wanted, at = [np.array(mode)], [], 0
    for number, (begin, end) in enumerate(spans):
        sentinel = np.array([first + number])
        given += [text[at:begin], sentinel]
        wanted += [sentinel, text[begin:end]]
        at = end
    given.append(text[at:])                              # empty: noise is last
    scored = sum(map(len, given))
    return np.concatenate([*given, *wanted, [first + len(spans)]]), scored

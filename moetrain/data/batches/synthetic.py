"""Generated sequences: several domains, each a Markov chain that a tiny model learns within a hundred steps.

A domain has an alphabet of its own (at most 16 tokens; alphabets overlap only if the vocabulary is small) and
a table of four successors for each token, taken with probabilities 0.7, 0.2, 0.07, 0.03: about 0.86 nats a
token at best. A sequence depends on (seed, sample id) alone. Held-out sequences have ids that no step
reaches.
"""

import hashlib

import numpy as np

from moetrain.data.batches.batch import DOMAIN_IDS, HELDOUT_IDS, Batch, make_batch
from moetrain.data.batches.evaluated_domains import measured_parts
from moetrain.data.batches.permutation import philox

_ALPHABET = 16
_CUMULATIVE = np.array([0.7, 0.9, 0.97])


class SyntheticDataset:
    """Dataset of generated sequences without an end. The domain of a sample is drawn uniformly.

    Args:
        vocab_size: tokens of the vocabulary.
        num_domains: number of domains.
        seq_len: targets of a sequence.
        global_batch: sequences of a step.
        seed: seed of the tables and the sequences.
        min_length: shortest sequence as a share of seq_len, in (0, 1]; the rest of a sequence is padding.
        mask_documents: whether batches number documents; a sequence is one document.
    """

    tokens = None
    order = "numbers-1"

    def __init__(self, *, vocab_size: int, num_domains: int, seq_len: int, global_batch: int, seed: int,
                 min_length: float = 1.0, mask_documents: bool = False) -> None:
        self.vocab_size = vocab_size
        self.domains = tuple(f"domain_{number}" for number in range(num_domains))
        self._parts = measured_parts(self.domains, [0] * num_domains)
        self.measured = tuple(part.name for part in self._parts)
        parameters = ("synthetic-1", vocab_size, num_domains, min_length, seed)
        self.fingerprint = hashlib.sha256(repr(parameters).encode()).hexdigest()
        self._seq_len, self._global_batch, self._seed = seq_len, global_batch, seed
        self._shortest = min(max(int(np.ceil(min_length * seq_len)), 1), seq_len)
        self._mask_documents = mask_documents
        self._alphabets = _alphabets(seed, vocab_size, num_domains)
        self._successors = _successors(seed, self._alphabets)

    def sample_ids(self, step: int, slots: range | np.ndarray) -> np.ndarray:
        assert step >= 1, step
        return (step - 1) * self._global_batch + np.asarray(slots, np.int64)

    def batch(self, sample_ids: np.ndarray) -> Batch:
        sample_ids = np.asarray(sample_ids, np.int64)
        draws = np.stack([philox(self._seed, "sample", int(id)).random_raw(self._seq_len + 3)
                          for id in sample_ids])
        drawn = (draws[:, 0] % np.uint64(len(self.domains))).astype(np.int64)
        domains = np.where(sample_ids >= HELDOUT_IDS, (sample_ids - HELDOUT_IDS) // DOMAIN_IDS, drawn)
        spread = np.uint64(self._seq_len - self._shortest + 1)
        lengths = self._shortest + (draws[:, 1] % spread).astype(np.int64)
        documents = np.zeros((len(sample_ids), self._seq_len), np.int64) if self._mask_documents else None
        rows = self._walk(domains, draws[:, 2:])
        return make_batch(rows[:, :-1], rows[:, 1:], lengths, sample_ids, domains, documents)

    def heldout_ids(self, part: int, windows: int) -> np.ndarray:
        """Exactly `windows` ids, spread over the domains of the part."""
        numbers, domains = np.arange(windows, dtype=np.int64), np.asarray(self._parts[part].domains, np.int64)
        return HELDOUT_IDS + domains[numbers * len(domains) // max(windows, 1)] * DOMAIN_IDS + numbers

    def bytes_of_targets(self, batch: Batch) -> None:
        """None: generated tokens stand for no text."""

    def epochs(self, sequences: int) -> np.ndarray:
        return np.full(len(self.domains), np.nan)

    def _walk(self, domains: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int64 [B, S + 1] tokens: all chains advance one step at a time."""
        choices = np.searchsorted(_CUMULATIVE, (draws >> np.uint64(11)) * 2.0 ** -53, "right")
        letters = np.empty(draws.shape, np.int64)
        letters[:, 0] = draws[:, 0] % np.uint64(self._alphabets.shape[1])
        for position in range(1, letters.shape[1]):
            letters[:, position] = self._successors[domains, letters[:, position - 1], choices[:, position]]
        return self._alphabets[domains[:, None], letters]


def _alphabets(seed: int, vocab_size: int, num_domains: int) -> np.ndarray:
    """int64 [domains, letters] tokens. Disjoint if the vocabulary has two tokens or more for each domain."""
    disjoint = vocab_size >= 2 * num_domains
    letters = min(_ALPHABET, vocab_size // num_domains if disjoint else vocab_size)
    shuffled = np.argsort(philox(seed, "alphabets").random_raw(vocab_size), kind="stable")
    return shuffled[np.arange(num_domains * letters) % vocab_size].reshape(num_domains, letters)


def _successors(seed: int, alphabets: np.ndarray) -> np.ndarray:
    """int64 [domains, letters, choices], index of the next letter.

    The likeliest successors form one cycle, so that a chain visits every letter.
    """
    num_domains, letters = alphabets.shape
    drawn = philox(seed, "successors").random_raw(num_domains * letters * 4)
    table = (drawn % np.uint64(letters)).astype(np.int64).reshape(num_domains, letters, 4)
    for domain in range(num_domains):
        cycle = np.argsort(philox(seed, "cycle", domain).random_raw(letters), kind="stable")
        table[domain, cycle, 0] = np.roll(cycle, -1)
    return table

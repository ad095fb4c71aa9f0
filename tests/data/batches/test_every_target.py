"""Every token of the training text is a target exactly once an epoch, for loaders of 1, 2 and 4 ranks.

Each word occurs once in the whole text and is a token of its own, so a target tells its place in the stream.
"""

import contextlib
import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from moetrain.cli import data
from moetrain.config.compose import compose
from moetrain.data.loader import Batch, Loader, TokenDataset, build_dataset
from tests.support.prepared_reader import StoredDataset, read_dataset

WORDS = 6 * 5 * 64 + 1
GLOBAL_BATCH = 8
RANKS = (1, 2, 4)
# Words of the documents of each domain: shorter than a sequence, one document, exactly full windows, many.
DOMAINS = st.lists(st.lists(st.sampled_from([1, 2, 3, 7, 15, 16, 31, 64]), min_size=1, max_size=5),
                   min_size=1, max_size=6)


def prepare(folder: Path, domains: Sequence[Sequence[int]]) -> StoredDataset:
    """Documents of so many words each, no word twice, through the command."""
    words = iter(f"w{number}" for number in range(WORDS))
    for number, lengths in enumerate(domains):
        (folder / "text" / f"domain{number}").mkdir(parents=True)
        for place, length in enumerate(lengths):
            text = " ".join(next(words) for _ in range(length))
            (folder / "text" / f"domain{number}" / f"{place}.txt").write_text(text)
    (folder / "held.txt").write_text(next(words))
    vocabulary = {f"w{number}": number for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {"<|endoftext|>": WORDS}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        data.run(["prepare", f"data.path={folder / 'text'}", f"data.held_out={folder / 'held.txt'}",
                  f"data.cache={folder / 'cache'}", f"data.tokenizer={folder / 'tokenizer.json'}"])
    return read_dataset(Path(said.getvalue().splitlines()[-1]))


class Epochs:
    """How often each token of the stream has been a target."""

    def __init__(self, stored: StoredDataset) -> None:
        self.end = stored.description["end_id"]
        self.stream = np.concatenate([[*document.ids.tolist(), self.end] for document in stored.train])
        self.domains = np.concatenate([[document.domain] * (len(document.ids) + 1)
                                       for document in stored.train])
        ends = np.flatnonzero(self.stream == self.end)
        self.places, self.end_places = np.full(WORDS + 1, -1), np.full(WORDS + 1, -1)
        self.places[self.stream] = np.arange(len(self.stream))
        # an end id is told by the word before it, which is its input
        self.end_places[self.stream[ends - 1]] = ends
        self.counts = np.zeros(len(self.stream), dtype=np.int64)
        self.empty = 0

    def add(self, batch: Batch) -> None:
        """Count targets. The input of each is the token before it; that of the stream's first is its last."""
        valid = batch.valid_BS.numpy()
        tokens, targets = batch.tokens_BS.numpy()[valid], batch.targets_BS.numpy()[valid]
        at = np.where(targets == self.end, self.end_places[tokens], self.places[targets])
        assert ((at >= 0).all()
                and (self.stream[at - 1] == tokens).all()), "the input of a target is not the token before it"
        np.add.at(self.counts, at, 1)
        self.empty += int((~valid).sum())

    def check_spread(self) -> None:
        """No token comes again before all others of its domain have."""
        for domain in np.unique(self.domains):
            own = self.counts[self.domains == domain]
            assert own.max() - own.min() <= 1, f"{domain}: a token comes again before another has come"


def count(dataset: TokenDataset, stored: StoredDataset, ranks: int, steps: int) -> Epochs:
    """The targets of so many steps, read by so many ranks."""
    epochs, micro_batch = Epochs(stored), GLOBAL_BATCH // ranks // (2 if ranks == 2 else 1)
    loaders = [Loader(dataset, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, rank=rank, ranks=ranks)
               for rank in range(ranks)]
    for step in range(1, steps + 1):
        for loader in loaders:
            for batch in loader.step(step):
                epochs.add(batch)
        epochs.check_spread()
    return epochs


def check(domains: Sequence[Sequence[int]], mixture: str, seq_len: int, weights: str) -> None:
    with tempfile.TemporaryDirectory(prefix="targets") as name:
        stored = prepare(Path(name), domains)
        folder = Path(name) / "cache" / stored.description["fingerprint"][:16]
        config = compose(["data=tokens", f"data.path={folder}", f"data.mixture={mixture}",
                          f"data.weights={weights}", f"train.seq_len={seq_len}",
                          f"train.global_batch={GLOBAL_BATCH}"])
        dataset = build_dataset(config, Path(name) / "run", None)
        tokens = sum(len(document.ids) + 1 for document in stored.train)
        windows = -(-tokens // seq_len)
        steps = windows // math.gcd(windows, GLOBAL_BATCH)  # after which whole epochs of all text are over
        first, *others = [count(dataset, stored, ranks, steps) for ranks in RANKS]
        assert all((other.counts == first.counts).all()
                   for other in others), "the number of ranks changes what is trained on"
        assert first.counts.sum() + first.empty == steps * GLOBAL_BATCH * seq_len
        if mixture == "proportional" and weights == "{}":
            epochs = steps * GLOBAL_BATCH // windows
            assert (first.counts == epochs).all(), "every token once in each of so many epochs"
            assert (first.empty == epochs * (windows * seq_len - tokens)
                    and windows * seq_len - tokens < seq_len)


@settings(max_examples=8, derandomize=True, database=None, deadline=None,
          suppress_health_check=list(HealthCheck))
@given(DOMAINS, st.sampled_from(["proportional", "uniform"]), st.sampled_from([4, 16, 33]),
       st.sampled_from(["{}", "{}", "{domain0: 3}", "{domain0: 0.3}"]))
def test_every_token_is_a_target_once_an_epoch(domains: list[list[int]], mixture: str, seq_len: int,
                                               weights: str) -> None:
    check(domains, mixture, seq_len, weights)


@pytest.mark.full
@settings(max_examples=300, derandomize=True, database=None, deadline=None,
          suppress_health_check=list(HealthCheck))
@given(DOMAINS, st.sampled_from(["proportional", "uniform"]), st.integers(2, 40),
       st.sampled_from(["{}", "{domain0: 3}", "{domain0: 0.3}", "{domain0: 1.7}"]))
def test_every_token_is_a_target_once_an_epoch_in_many_more(domains: list[list[int]], mixture: str,
                                                            seq_len: int, weights: str) -> None:
    check(domains, mixture, seq_len, weights)

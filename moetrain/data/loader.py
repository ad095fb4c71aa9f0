"""The micro-batches of a rank, and the dataset that a config describes.

A step has global_batch slots. Micro-batch a, rank r, item i hold slot a * (ranks * micro_batch) + r *
micro_batch + i: the number of ranks decides who reads a slot, never what is in it.
"""

from pathlib import Path

import numpy as np

from moetrain.config.build import part
from moetrain.config.schema import Config, DataConfig
from moetrain.data.batches.batch import Batch, Dataset
from moetrain.data.batches.synthetic import SyntheticDataset
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.preparation.by_fingerprint import prepared_place
from moetrain.data.preparation.prepare import tokens_path
from moetrain.data.preparation.prepared_dataset import Prepared, open_prepared
from moetrain.data.pretokenized.account import TokenAccount
from moetrain.data.pretokenized.memmap import open_memmap
from moetrain.data.pretokenized.token_files import TokenFiles
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from moetrain.errors import DataError

__all__ = ["Batch", "Dataset", "Loader", "SyntheticDataset", "TokenDataset", "build_dataset", "open_tokens",
           "token_dataset"]

# In a package above this one: found by name, so that nothing here imports Megatron-Core.
INDEXED = "moetrain.interop.megatron.open_indexed"
TOKEN_FILES = ("megatron", "memmap")         # kinds of data in files of other programs


class Loader:
    """Reader of one rank's slots of a step. It has no state, so any step can be read.

    Args:
        dataset: the dataset.
        global_batch: sequences of a step, over all ranks.
        micro_batch: sequences of a micro-batch.
        rank: index of this rank among those that read different data.
        ranks: number of such ranks.
    """

    def __init__(self, dataset: Dataset, *, global_batch: int, micro_batch: int, rank: int,
                 ranks: int) -> None:
        # config/rules/train.py refuses such configs.
        assert global_batch % (micro_batch * ranks) == 0, (global_batch, micro_batch, ranks)
        assert 0 <= rank < ranks, (rank, ranks)
        self._dataset, self._micro_batch, self._rank, self._ranks = dataset, micro_batch, rank, ranks
        self.micro_batches = global_batch // (micro_batch * ranks)

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of this rank in a step (from 1)."""
        return [self._dataset.batch(self._dataset.sample_ids(step, self._slots(number)))
                for number in range(self.micro_batches)]

    def _slots(self, number: int) -> np.ndarray:
        return (number * self._ranks + self._rank) * self._micro_batch + np.arange(self._micro_batch)


def build_dataset(config: Config, run_dir: Path, prepared: Path | None, *, trains: bool = True,
                  indexes: TokenIndexes = TokenIndexes()) -> Dataset:
    """Build the dataset of a run.

    Args:
        config: the config of the run.
        run_dir: its directory, for errors.
        prepared: what `prepare_from_config` returned for `data=text`; the same on all ranks.
        trains: whether training windows are needed.
        indexes: store of the indexes of pre-tokenized files.
    """
    data = config.data
    if data.kind == "synthetic":
        return SyntheticDataset(vocab_size=data.vocab_size, num_domains=data.num_domains,
                                min_length=data.min_length, seed=config.data_seed,
                                mask_documents=data.mask_documents, **_sizes(config))
    if data.kind == "text" and prepared is None:
        raise DataError(51, "the text is not prepared", where=str(prepared_place(data, run_dir)),
                        why="no prepared folder was handed over",
                        next="moetrain data prepare, or start the run anew")
    if data.kind == "text":                                  # just written or verified by `prepare`
        return token_dataset(config, open_prepared(prepared, verify=False), trains=trains)
    return token_dataset(config, open_tokens(data, indexes), trains=trains)


def open_tokens(data: DataConfig, indexes: TokenIndexes,
                account: TokenAccount | None = None) -> Prepared | TokenFiles:
    """Open the data of `data=tokens`, `data=megatron` or `data=memmap`.

    Args:
        data: the section `data` of the config.
        indexes: store of the indexes of pre-tokenized files.
        account: filled in with every pre-tokenized file and its use.
    """
    if data.kind == "tokens":
        return open_prepared(tokens_path(data.path), verify=True)
    files = {"path": data.path, "tokenizer": data.tokenizer, "vocab_size": data.vocab_size,
             "end_token": data.end_token, "held_out": data.held_out, "held_out_share": data.held_out_share,
             "split": data.split, "indexes": indexes, "account": account}
    if data.kind == "memmap":
        return open_memmap(**files, dtype=data.dtype)
    return part(INDEXED, "indexed")(**files, weights=dict(data.weights))


def token_dataset(config: Config, opened: Prepared | TokenFiles, *, trains: bool = True) -> TokenDataset:
    """Windows over opened tokens, in the order of training."""
    data = config.data
    mixture, weights = data.mixture, data.weights
    # The shares of a blend are of samples: uniform domains, times the share.
    if isinstance(opened, TokenFiles) and opened.shares is not None:
        mixture, weights = "uniform", opened.shares
    return TokenDataset(prepared=opened, seed=config.data_seed, mixture=mixture, weights=weights,
                        mask_documents=data.mask_documents, trains=trains, **_sizes(config))


def _sizes(config: Config) -> dict[str, int]:
    return {"seq_len": config.train.seq_len, "global_batch": config.train.global_batch}

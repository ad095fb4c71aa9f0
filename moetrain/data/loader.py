"""The micro-batches of a rank, and the dataset that a config asks for.

A step has global_batch slots. Micro-batch a, rank r, item i hold slot a * (ranks * micro_batch) + r * micro_batch + i:
the number of ranks decides who reads a slot, never what is in it.
"""

from pathlib import Path

import numpy as np

from moetrain.config.build import build
from moetrain.config.schema import Config
from moetrain.data.batch import Batch, Dataset
from moetrain.data.memmap import open_memmap
from moetrain.data.prepare import tokens_path
from moetrain.data.prepared import open_prepared
from moetrain.data.synthetic import SyntheticDataset
from moetrain.data.token_dataset import TokenDataset
from moetrain.errors import DataError

__all__ = ["Batch", "Dataset", "Loader", "SyntheticDataset", "TokenDataset", "build_dataset"]

# Of a room above this one: found by name, so that nothing here imports Megatron-Core.
INDEXED = "moetrain.interop.megatron.open_indexed"


class Loader:
    """Reads a step's slots of one rank. It has no state: any step can be asked for."""

    def __init__(self, dataset: Dataset, *, global_batch: int, micro_batch: int, rank: int, ranks: int) -> None:
        assert global_batch % (micro_batch * ranks) == 0, (global_batch, micro_batch, ranks)   # config/rules/train.py
        assert 0 <= rank < ranks, (rank, ranks)
        self._dataset, self._micro_batch, self._rank, self._ranks = dataset, micro_batch, rank, ranks
        self.micro_batches = global_batch // (micro_batch * ranks)

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of this rank in a step (from 1)."""
        return [self._dataset.batch(self._dataset.sample_ids(step, self._slots(number)))
                for number in range(self.micro_batches)]

    def _slots(self, number: int) -> np.ndarray:
        return (number * self._ranks + self._rank) * self._micro_batch + np.arange(self._micro_batch)


def build_dataset(config: Config, run_dir: Path, prepared: Path | None, *, trains: bool = True) -> Dataset:
    """The dataset of a run.

    prepared: what `prepare_from_config` returned (data=text); on all ranks the same. trains: whether it is to be trained on.
    """
    data, sizes = config.data, {"seq_len": config.train.seq_len, "global_batch": config.train.global_batch}
    if data.kind == "synthetic":
        return SyntheticDataset(vocab_size=data.vocab_size, num_domains=data.num_domains, min_length=data.min_length,
                                seed=config.data_seed, mask_documents=data.mask_documents, **sizes)
    if data.kind == "text" and prepared is None:
        raise DataError(51, "the text is not prepared", where=str(Path(data.cache) if data.cache else run_dir / "data"),
                        why="no prepared folder was handed over", next="moetrain data prepare, or start the run anew")
    mixture, weights = data.mixture, data.weights
    if data.kind in ("megatron", "memmap"):
        files = {"path": data.path, "tokenizer": data.tokenizer, "vocab_size": data.vocab_size, "end_token": data.end_token,
                 "held_out": data.held_out, "held_out_share": data.held_out_share, "split": data.split}
        if data.kind == "memmap":
            opened = open_memmap(**files, dtype=data.dtype)
        else:
            opened = build({"_target_": INDEXED, **files, "weights": dict(data.weights)}, "indexed")
        if opened.shares is not None:                # of the samples: each domain alike, times its weight
            mixture, weights = "uniform", opened.shares
    else:
        folder = prepared if data.kind == "text" else tokens_path(data.path)
        opened = open_prepared(folder, verify=data.kind == "tokens")  # prepare has just written or verified text
    return TokenDataset(prepared=opened, seed=config.data_seed, mixture=mixture, weights=weights,
                        mask_documents=data.mask_documents, trains=trains, **sizes)

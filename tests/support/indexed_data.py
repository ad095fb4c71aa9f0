"""Indexed datasets, by Megatron-Core's own builder."""

import warnings
from pathlib import Path

import numpy as np
import torch


def build(prefix: Path, documents: list[list[np.ndarray]], dtype: type = np.uint16) -> None:
    """Documents of one or more sequences, by Megatron's builder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.from_numpy(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def numbered(count: int, length: int = 50) -> list[list[np.ndarray]]:
    """Documents whose tokens tell where they come from."""
    return [[np.arange(length) + number * length] for number in range(count)]

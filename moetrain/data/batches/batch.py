"""What a dataset hands to the trainer.

Shapes: B sequences, S positions.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# Sample ids from here on are held-out windows: no training sample has one, so keyed randomness never repeats.
HELDOUT_IDS = 1 << 56
DOMAIN_IDS = 1 << 40           # held-out ids of one domain
ALIGNMENT = 16                 # bytes: where a field of a batch begins in packed memory


class Batch(NamedTuple):
    tokens_BS: Tensor             # int64 inputs; 0 in padding
    targets_BS: Tensor            # int64 next tokens; -1 where there is none
    valid_BS: Tensor              # bool: the position holds a token and has a target
    sample_ids_B: Tensor          # int64
    domains_B: Tensor             # int64: index in Dataset.domains
    # int64: number of the document inside the sequence, from 0; only with mask_documents
    documents_BS: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device: all fields in one copy, for which the host does not wait."""
        if device.type == "cpu":
            return self
        fields = [field for field in self if field is not None]
        ends = list(accumulate(-(-field.nbytes // ALIGNMENT) * ALIGNMENT for field in fields))
        packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        for field, memory in zip(fields, _unpacked(packed, fields, ends)):
            memory.copy_(field)
        there = iter(_unpacked(packed.to(device, non_blocking=True), fields, ends))
        return Batch(*(field if field is None else next(there) for field in self))


def _unpacked(packed: Tensor, fields: Sequence[Tensor], ends: Sequence[int]) -> list[Tensor]:
    """Views of packed bytes, of the fields' dtypes and shapes."""
    return [packed[begin:begin + field.nbytes].view(field.dtype).view(field.shape)
            for field, begin in zip(fields, [0, *ends])]


def padding(sequences: int, seq_len: int, *, mask_documents: bool) -> Batch:
    """Sequences without a token, of the shape of others."""
    tokens_BS = torch.zeros(sequences, seq_len, dtype=torch.int64)
    return Batch(tokens_BS, tokens_BS - 1, tokens_BS.bool(), tokens_BS[:, 0], tokens_BS[:, 0],
                 tokens_BS if mask_documents else None)


class Dataset(Protocol):
    """Sequences by number. `sample_ids` says which ones a step trains on, whoever reads them."""

    vocab_size: int
    domains: tuple[str, ...]
    # what held-out text is measured as: the domains, or the largest and the rest as one
    measured: tuple[str, ...]
    fingerprint: str
    order: str  # which rule says what a step trains on: another release may have another one
    tokens: int | None            # that are trained on, each once an epoch; None where they never repeat

    def sample_ids(self, step: int, slots: range | np.ndarray) -> np.ndarray:
        """Ids in the slots of a step (from 1): a pure function of (seed, fingerprint, step, slot)."""
        ...

    def batch(self, sample_ids: np.ndarray) -> Batch: ...

    def heldout_ids(self, part: int, windows: int) -> np.ndarray:
        """Ids of at most so many held-out sequences of measured[part], the same ones every time; fewer when there are fewer."""
        ...

    def bytes_of_targets(self, batch: Batch) -> int | None:
        """Bytes of text that the valid targets stand for: the denominator of nats per byte. None where nobody knows."""
        ...

    def epochs(self, sequences: int) -> np.ndarray:
        """How often so many training sequences read each domain; float64, 0 for one that is left out, NaN without an end."""
        ...


def make_batch(inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray, sample_ids: np.ndarray,
               domains: np.ndarray, documents: np.ndarray | None) -> Batch:
    """From rows [B, S] of inputs and of targets, of which the first `lengths` count."""
    tokens_BS, targets_BS = torch.from_numpy(inputs), torch.from_numpy(targets)
    valid_BS = torch.arange(tokens_BS.shape[1]) < torch.from_numpy(lengths)[:, None]
    return Batch(tokens_BS.where(valid_BS, 0), targets_BS.where(valid_BS, -1), valid_BS,
                 torch.from_numpy(sample_ids.astype(np.int64)), torch.from_numpy(domains.astype(np.int64)),
                 None if documents is None else torch.from_numpy(documents))

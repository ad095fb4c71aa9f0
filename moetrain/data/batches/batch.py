"""The batch that a dataset gives to the trainer, and the interface of datasets.

Shapes: B sequences, S positions.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# Ids of held-out windows start here. No training sample has such an id, so keyed randomness never repeats.
HELDOUT_IDS = 1 << 56
DOMAIN_IDS = 1 << 40           # ids reserved for each part of the held-out text
GENERATED_IDS = 1 << 57        # ids of texts that are generated start here
ALIGNMENT = 16                 # bytes; alignment of the fields of a batch in packed memory


class Batch(NamedTuple):
    """One micro-batch of a rank."""

    tokens_BS: Tensor             # int64 inputs; 0 in padding
    targets_BS: Tensor            # int64 next tokens; -1 where none is scored, as in prompts and padding
    valid_BS: Tensor              # bool: the position holds a token, which is routed and balanced
    sample_ids_B: Tensor          # int64
    domains_B: Tensor             # int64: index in Dataset.domains
    documents_BS: Tensor | None   # int64: document of the sequence, from 0; only with mask_documents

    @property
    def scored_BS(self) -> Tensor:  # noqa: N802
        """Whether the position has a target that the language loss scores; bool."""
        return self.targets_BS >= 0

    def repeated(self, times: int) -> "Batch":
        """The batch so many times, one after the other along B."""
        if times == 1:
            return self
        return Batch(*(field if field is None else torch.cat([field] * times) for field in self))

    def ahead(self, by: int) -> "Batch":
        """The batch `by` positions further ahead: position i has token and target of position i + `by`.

        Where that lies behind the sequence, in padding or in another document of `documents_BS`, the position
        is not valid and has no target.
        """
        def shifted(values_BS: Tensor, behind: int) -> Tensor:
            found = torch.full_like(values_BS, behind)
            found[:, :-by] = values_BS[:, by:]
            return found

        valid_BS = self.valid_BS & shifted(self.valid_BS, False)
        if self.documents_BS is not None:
            valid_BS &= self.documents_BS == shifted(self.documents_BS, -1)
        return self._replace(tokens_BS=shifted(self.tokens_BS, 0).where(valid_BS, 0),
                             targets_BS=shifted(self.targets_BS, -1).where(valid_BS, -1), valid_BS=valid_BS)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. All fields travel in one asynchronous copy from pinned memory."""
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
    """Views into packed bytes with the dtypes and shapes of the fields."""
    return [packed[begin:begin + field.nbytes].view(field.dtype).view(field.shape)
            for field, begin in zip(fields, [0, *ends])]


def padding(sequences: int, seq_len: int, *, mask_documents: bool) -> Batch:
    """A batch of sequences without a token, in the shape of the others."""
    tokens_BS = torch.zeros(sequences, seq_len, dtype=torch.int64)
    return Batch(tokens_BS, tokens_BS - 1, tokens_BS.bool(), tokens_BS[:, 0], tokens_BS[:, 0],
                 tokens_BS if mask_documents else None)


class Dataset(Protocol):
    """Interface of a dataset: sequences by number.

    `sample_ids` says which sequences a step trains on, whichever rank reads them.
    """

    vocab_size: int
    domains: tuple[str, ...]
    measured: tuple[str, ...]     # names under which held-out loss is measured (evaluated_domains.py)
    fingerprint: str
    order: str                    # version of the rule that says what a step trains on
    tokens: int | None            # tokens of an epoch, each trained on once; None if they never repeat

    def sample_ids(self, step: int, slots: range | np.ndarray) -> np.ndarray:
        """Ids in the slots of a step (from 1): a pure function of (seed, fingerprint, step, slot)."""
        ...

    def batch(self, sample_ids: np.ndarray) -> Batch: ...

    def heldout_ids(self, part: int, windows: int) -> np.ndarray:
        """Ids of at most `windows` held-out sequences of measured[part].

        They are the same ones every time; fewer if there are not so many.
        """
        ...

    def bytes_of_targets(self, batch: Batch) -> int | None:
        """Bytes of text that the scored targets stand for, the denominator of nats per byte.

        None if unknown.
        """
        ...

    def epochs(self, sequences: int) -> np.ndarray:
        """How often `sequences` training sequences read each domain.

        Returns:
            float64 [domains]; 0 for a domain that is left out, NaN for one without an end.
        """
        ...


def make_batch(inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray, sample_ids: np.ndarray,
               domains: np.ndarray, documents: np.ndarray | None) -> Batch:
    """Build a batch from arrays.

    Args:
        inputs: int64 [B, S].
        targets: int64 [B, S], next token of each input.
        lengths: int64 [B], leading positions of each row that count; the rest is padding.
        sample_ids: int64 [B].
        domains: int64 [B], index of the domain.
        documents: int64 [B, S], number of the document inside the row, or None.
    """
    tokens_BS, targets_BS = torch.from_numpy(inputs), torch.from_numpy(targets)
    valid_BS = torch.arange(tokens_BS.shape[1]) < torch.from_numpy(lengths)[:, None]
    return Batch(tokens_BS.where(valid_BS, 0), targets_BS.where(valid_BS, -1), valid_BS,
                 torch.from_numpy(sample_ids.astype(np.int64)), torch.from_numpy(domains.astype(np.int64)),
                 None if documents is None else torch.from_numpy(documents))

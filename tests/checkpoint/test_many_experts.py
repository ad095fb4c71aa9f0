"""With 60 layers of 256 experts, each expert adds one row of numbers to a checkpoint and nothing else.

Counted, not timed: objects of torch's planner, entries, syncs, files, reads.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import metadata, planner_helpers

from moetrain.checkpoint import disk, records
from moetrain.checkpoint.commit import commit, write_rank
from moetrain.checkpoint.manifest import NAME, read_manifest
from moetrain.checkpoint.payload import TensorRows
from moetrain.parallel.state_shards import DTYPE_NAMES, StateShard
from moetrain.train.checkpoint.load import CheckpointLoader
from moetrain.train.checkpoint.snapshot import as_bytes

LAYERS, EXPERTS, RANKS = 60, 256, 4


def held(rank: int, fill: float | None = None) -> Iterator[StateShard]:
    """Experts of one rank of four; each is filled with its own number."""
    for layer in range(LAYERS):
        for expert in range(rank, EXPERTS, RANKS):
            rows = torch.full((2, 2), float(layer * EXPERTS + expert) if fill is None else fill)
            yield StateShard(f"model.layers.{layer}.moe.experts.{expert}.down", (2, 2), 0, rows,
                             "expert_grad")


def counting(counts: Counter, name: str, original):
    def count(*arguments, **keywords):
        counts[name] += 1
        return original(*arguments, **keywords)
    return count


def test_15360_experts_are_rows_of_a_table(tmp_path: Path) -> None:
    temporary, final = tmp_path / "checkpoints/step-00000001.tmp-1", tmp_path / "checkpoints/step-00000001"
    changes, counts = Counter(), Counter()
    torchs = (patch.object(module, name, counting(counts, name, getattr(module, name))) for module, name in (
        (planner_helpers, "create_read_items_for_chunk_list"), (metadata, "ChunkStorageMetadata"),
        (metadata, "TensorStorageMetadata")))
    with disk.observed(lambda when, what, path, length: changes.update([what] if when == "before" else [])):
        for rank in range(RANKS):
            items = [TensorRows(p.name, DTYPE_NAMES[p.rows.dtype], p.shape, 0, 2, as_bytes(p.rows))
                     for p in held(rank)]
            write_rank(temporary, rank, items, 1)
        commit(temporary, final, ranks=RANKS, facts={}, values={"step": 1, "tokens": 1})
    # Payload and index of each rank; manifest, directory and parent.
    assert changes["fsync"] == 2 * RANKS + 3
    assert changes["write"] == LAYERS * EXPERTS + 2 * RANKS + 1
    found = read_manifest(final)
    assert not found.tensors and len(found.experts) == LAYERS and len(list(found.names())) == LAYERS * EXPERTS

    state_shards = list(held(1, fill=-1.0))
    with patch.object(records, "TensorEntry", counting(counts, "TensorEntry", records.TensorEntry)), \
            patch.object(os, "preadv", counting(counts, "preadv", os.preadv)):
        for torch_part in torchs:
            torch_part.start()
        loading = CheckpointLoader(state_shards, final, "full")
        assert counts["preadv"] == RANKS                 # headers
        loading.verify()
        loading.fill()
        patch.stopall()
    each = LAYERS * EXPERTS // RANKS
    assert counts == {"TensorEntry": each, "preadv": RANKS + 1 + 2 * each}
    for shard, truth in zip(state_shards, held(1)):
        assert torch.equal(shard.rows, truth.rows), shard.name
    assert (final / NAME).stat().st_size < 40 * LAYERS * EXPERTS

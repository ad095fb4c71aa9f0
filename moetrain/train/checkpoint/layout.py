"""Layout of checkpoints across ranks: which shards a rank writes, and which rows it reads from where.

Chunks and shards are ranges of rows. Where a tensor lies in several chunks, a pure function of torch's
distributed checkpoint (DCP) computes the overlaps, on one-dimensional boxes. Its sweep runs along the longest
dimension; for boxes with columns that is seldom the rows, and it would then compare every pair. Whole
tensors, among them all experts, need no object of DCP.
"""

import heapq
from collections.abc import Iterable
from typing import NamedTuple

import torch

from moetrain.checkpoint.records import Chunk, TensorEntry, row_count
from moetrain.comm.mesh import Mesh
from moetrain.parallel.state_shards import DTYPES, StateShard


class Read(NamedTuple):
    """Read of `rows` rows, from row `source` of a chunk on, to row `target` of a shard on."""

    chunk: Chunk
    source: int
    target: int
    rows: int


def shards_to_write(shards: Iterable[StateShard], mesh: Mesh) -> list[StateShard]:
    """Choose the shards that this rank writes.

    Of the ranks that hold a shard, the one with the fewest bytes so far writes it.
    No communication is needed, because ranks that hold the same shards see them in the same order. The
    commit would detect a disagreement.
    """
    loads: dict[str, list[tuple[int, int]]] = {}
    mine = []
    for shard in shards:
        if not shard.rows.numel():
            continue
        group = mesh[shard.held_by]
        load = loads.setdefault(group.name, [(0, position) for position in range(group.size)])
        size, position = load[0]
        heapq.heapreplace(load, (size + shard.rows.numel() * shard.rows.element_size(), position))
        if position == group.position:
            mine.append(shard)
    return mine


def plan_reads(name: str, entry: TensorEntry, first: int, rows: int) -> list[Read]:
    """Plan the reads that cover rows [first, first + rows) of a tensor exactly once.

    Args:
        name: of the tensor.
        entry: its record in the manifest.
        first: first row.
        rows: number of rows.
    """
    if len(entry.chunks) < 2:
        return [Read(chunk, first - chunk.first, 0, rows) for chunk in entry.chunks]
    found = _overlaps(name, entry, first, rows)
    # A manifest has every row once.
    assert sum(read.rows for read in found) == rows, (name, first, rows, found)
    return found


def _overlaps(name: str, entry: TensorEntry, first: int, rows: int) -> list[Read]:
    # Imported here, because the import takes as long as that of all of moetrain and only sharded
    # tensors need it.
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    def box(begin: int, count: int) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([begin]), sizes=torch.Size([count]))

    saved = TensorStorageMetadata(properties=TensorProperties(dtype=DTYPES[entry.dtype]),
                                  size=torch.Size([row_count(entry.shape)]),
                                  chunks=[box(chunk.first, chunk.rows) for chunk in entry.chunks])
    by_row = {chunk.first: chunk for chunk in entry.chunks}
    return [Read(by_row[item.storage_index.offset[0]], item.storage_offsets[0], item.dest_offsets[0],
                 item.lengths[0])
            for item in create_read_items_for_chunk_list(name, saved, [box(first, rows)])]

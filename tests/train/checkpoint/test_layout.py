"""Which rank writes what, and which rows are read from where."""

import random
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint import planner_helpers

from moetrain.checkpoint.records import Chunk, TensorEntry
from moetrain.comm.mesh import Group, Mesh
from moetrain.parallel.state_shards import StateShard
from moetrain.train.checkpoint.layout import plan_reads, shards_to_write


def meshes(size: int) -> list[Mesh]:
    """The ranks of a group of `size`, without processes: who writes is decided without talking."""
    return [Mesh({}, rank, torch.device("cpu"), {"dense_grad": Group("dense_grad", tuple(range(size)), rank)})
            for rank in range(size)]


def shard(name: str, rows: int = 4, held_by: str = "dense_grad") -> StateShard:
    return StateShard(name, (rows, 2), 0, torch.zeros(rows, 2), held_by)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_of_ranks_that_hold_the_same_piece_exactly_one_writes_and_the_bytes_are_spread(size):
    draw = random.Random(size)
    shards = [shard(f"{index}", draw.choice([1, 10, 10, 100])) for index in range(200)]
    written = [shards_to_write(iter(shards), mesh) for mesh in meshes(size)]
    assert sorted(shard.name for part in written for shard in part) == sorted(shard.name for shard in shards)
    sizes = [sum(shard.rows.numel() for shard in part) for part in written]
    assert max(sizes) - min(sizes) <= 200                # one shard


def test_pieces_of_another_group_do_not_change_who_writes():
    """An expert is held by other ranks than a norm: only those who hold a shard count it."""
    alone = [shard("a", 5), shard("b", 1), shard("c", 3)]
    for mesh in meshes(2):
        mesh.groups["expert_grad"] = Group("expert_grad", (mesh.rank,), 0)
        mixed = [alone[0], shard("x", 50, "expert_grad"), alone[1], alone[2]] if mesh.rank else alone
        assert ([p.name for p in shards_to_write(mixed, mesh) if p.name != "x"]
                == [p.name for p in shards_to_write(alone, mesh)])


def test_a_piece_without_elements_is_not_written():
    assert shards_to_write([shard("a", 0), shard("b")], meshes(1)[0])[0].name == "b"


def cut(rows: int, shards: int, draw: random.Random) -> TensorEntry:
    """A tensor of `rows` rows in chunks of random lengths."""
    ends = sorted(draw.sample(range(1, rows), shards - 1)) + [rows]
    return TensorEntry("F32", (rows, 1000),
                       tuple(Chunk(f"rank-{index:04d}.safetensors", 0, first, end - first, (0,))
                                            for index, (first, end) in enumerate(zip([0, *ends], ends))))


@pytest.mark.parametrize("chunks", [1, 2, 5, 30])
def test_reads_give_every_row_once_whatever_the_cuts(chunks):
    draw = random.Random(chunks)
    for _ in range(50):
        entry = cut(37, chunks, draw)
        first = draw.randrange(37)
        rows = draw.randrange(1, 38 - first)
        got = [-1] * rows
        for read in plan_reads("x", entry, first, rows):
            for row in range(read.rows):
                assert got[read.target + row] == -1
                got[read.target + row] = read.chunk.first + read.source + row
            assert 0 <= read.source and read.source + read.rows <= read.chunk.rows
        assert got == list(range(first, first + rows))


def test_the_sweep_goes_along_rows_even_where_columns_are_longer():
    """torch's planner sweeps along the longest dimension, so boxes must have one dimension, the rows."""
    compared = []
    original = planner_helpers._check_shard_metadata_pair_overlap

    def look(one, two):
        compared.append((one, two))
        return original(one, two)

    entry = TensorEntry("F32", (256, 4096),
                        tuple(Chunk("rank-0000.safetensors", 0, row, 1, (0,)) for row in range(256)))
    with patch.object(planner_helpers, "_check_shard_metadata_pair_overlap", look):
        assert len(plan_reads("x", entry, 0, 2)) == 2
        assert len(compared) == 2                        # along columns it would be 256
        assert len(plan_reads("x", entry, 254, 2)) == 2
        assert len(compared) <= 2 + 256                  # never more than one look at each chunk
    assert {len(box.sizes) for pair in compared for box in pair} == {1}


def test_tensors_in_one_chunk_need_no_object_of_torchs_planner():
    """15,360 experts: not one box, not one read item."""
    entry = TensorEntry("F32", (8, 4), (Chunk("rank-0000.safetensors", 0, 0, 8, (0,)),))
    made = Counter()
    with patch.object(planner_helpers, "create_read_items_for_chunk_list",
                      lambda *_: made.update(["called"]) or []):
        for _ in range(15_360):
            assert len(plan_reads("x", entry, 2, 3)) == 1
    assert not made

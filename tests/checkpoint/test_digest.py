"""The digest of weights: the CRC of a whole tensor follows from those of its parts, however it was cut."""

import random
import zlib

import pytest

from moetrain.checkpoint.digest import combined, tensor_crc, weights_digest
from moetrain.checkpoint.records import Chunk, ExpertTable, Manifest, PayloadFile, TensorEntry


def test_crcs_of_parts_combine_to_that_of_the_whole() -> None:
    draw = random.Random(0)
    for length in (0, 1, 7, 64, 1000, 70_001):
        content = draw.randbytes(length)
        for cut in {0, length // 3, length}:
            first, second = content[:cut], content[cut:]
            assert combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(content)


def entry(content: bytes, rows: list[int], block: int) -> TensorEntry:
    """A tensor of rows of 16 bytes, cut into chunks of so many rows and blocks of so many bytes."""
    chunks, first = [], 0
    for number, count in enumerate(rows):
        own = content[16 * first:16 * (first + count)]
        crcs = tuple(zlib.crc32(own[start:start + block]) for start in range(0, len(own), block))
        chunks.append(Chunk(f"rank-{number:04d}.safetensors", 8, first, count, crcs))
        first += count
    return TensorEntry("F32", (first, 4), tuple(chunks))


@pytest.mark.parametrize("rows", [[12], [5, 7], [1] * 12, [4, 4, 4]])
@pytest.mark.parametrize("block", [16, 40, 1 << 20])
def test_a_tensor_has_one_crc_however_it_is_cut(rows: list[int], block: int) -> None:
    content = random.Random(1).randbytes(12 * 16)
    assert tensor_crc(entry(content, rows, block), block) == zlib.crc32(content)


def manifest(content: bytes, rows: list[int], *, alone: bool = False, **others: TensorEntry) -> Manifest:
    """A tensor, two experts in a table or `alone`, and the state of an optimizer."""
    crcs = [zlib.crc32(content[:64]), zlib.crc32(content[64:128])]
    found = Manifest(files={"rank-0000.safetensors": PayloadFile(0, 0, 0)})
    found.tensors = {"model.embed": entry(content, rows, found.block), **others}
    if alone:
        for number, crc in enumerate(crcs):
            chunk = Chunk("rank-0000.safetensors", 64 * number, 0, 4, (crc,))
            found.tensors[f"model.layers.0.moe.experts.{number}.down"] = TensorEntry("F32", (4, 4), (chunk,))
    else:
        found.experts["model.layers.0.moe.experts.*.down"] = ExpertTable(
            "F32", (4, 4), [[0, 64 * number, crc] for number, crc in enumerate(crcs)])
    return found


def test_the_digest_names_content_and_nothing_else() -> None:
    content = random.Random(2).randbytes(12 * 16)
    digest = weights_digest(manifest(content, [12]))
    assert digest == weights_digest(manifest(content, [3, 9])) == weights_digest(
        manifest(content, [12], alone=True))
    moment = {"optim.embed.exp_avg": entry(content, [12], 1 << 20)}
    assert digest == weights_digest(manifest(content, [12], **moment))
    flipped = bytes([content[0] ^ 1]) + content[1:]
    assert digest != weights_digest(manifest(flipped, [12]))
    assert digest != weights_digest(manifest(content, [12], **{"buffer.x": entry(content, [12], 1 << 20)}))

"""Quantized weights of public checkpoints, computed back to float32 as they are read.

    fp8     DeepSeek-V3: `x` in float8_e4m3, `x_scale_inv` float32 with a number for each block of B x B
            numbers (128 unless quantization_config.weight_block_size says otherwise; the last of a row or
            column may be smaller):  w = fp8 * scale
    mxfp4   GPT-OSS: `x_blocks` [E, R, G, 16] of bytes with two 4-bit numbers each, the lower half first, and
            `x_scales` [E, R, G]:  w = FP4[bits] * 2^(scale - 127) in [E, R, 32 G]; the tensor `x` that the
            model has is this, its last two dims swapped

Both as in transformers (finegrained_fp8, mxfp4). A quantized tensor without its scales is refused, and so is
any other method: the numbers would look plausible and be wrong.

Shapes: E experts, R rows, I columns, G groups of 32 numbers.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.interop.huggingface.shard_file import StoredTensor

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"
BLOCK = 128
# Values of the 4-bit numbers; the highest bit is the sign.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_METHODS = ("fp8", "mxfp4")

# Reads rows [first, first + count) of a stored tensor; all of them where count is None.
Read = Callable[[str, int, int | None], Tensor]


class Quantized(NamedTuple):
    """A tensor that is stored in few bits.

    Attributes:
        values: name of the tensor of its bits.
        scales: name of the tensor of its scales.
        shape: of the tensor that it stands for.
        block: rows and columns under one scale, of fp8; None for mxfp4.
    """

    values: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None

    def read(self, read: Read, first: int = 0, count: int | None = None) -> Tensor:
        """Read and compute rows [first, first + count) of the tensor, float32."""
        if self.block is None:
            return mxfp4_values(read(self.values, first, count), read(self.scales, first, count))
        rows = self.shape[0] - first if count is None else count
        high = self.block[0]
        scales = read(self.scales, first // high, -(-(first + rows) // high) - first // high)
        return fp8_values(read(self.values, first, count), scales, self.block, first % high)


def fp8_values(values_RI: Tensor, scales: Tensor, block: tuple[int, int] = (BLOCK, BLOCK),
               skipped: int = 0) -> Tensor:
    """Multiply float8 numbers by the scales of their blocks.

    Args:
        values_RI: [R, I], float8.
        scales: one for each block of rows and columns.
        block: rows and columns of a block.
        skipped: rows of the first block that lie before the first of `values_RI`.

    Returns:
        float32 [R, I].
    """
    rows, columns = values_RI.shape
    row = (torch.arange(rows) + skipped) // block[0]
    column = torch.arange(columns) // block[1]
    return values_RI.float() * scales.float()[row][:, column]


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """Compute 4-bit numbers with a power of two for each 32 of them.

    Args:
        blocks: uint8 [E, R, G, 16].
        scales: uint8 [E, R, G], exponents plus 127.

    Returns:
        float32 [E, 32 G, R].
    """
    experts, rows, groups, _ = blocks.shape
    values = torch.empty(experts, 32 * groups, rows)
    for expert, numbers in enumerate(values):                 # one by one, so that no more is in memory
        numbers.copy_(_mxfp4_rows(blocks[expert], scales[expert]).T)
    return values


def _mxfp4_rows(blocks_RG: Tensor, scales_RG: Tensor) -> Tensor:
    """Compute the rows of one expert, float32 [R, 32 G]; arguments without their dim E."""
    pairs = torch.stack([blocks_RG & 15, blocks_RG >> 4], -1)      # the lower half is the first number
    numbers = torch.tensor(FP4)[pairs.int()].flatten(-2)
    return torch.ldexp(numbers, scales_RG.int()[..., None] - 127).flatten(-2)


def find_quantized(directory: Path, config: Mapping[str, Any],
                   stored: Mapping[str, StoredTensor]) -> tuple[dict[str, Quantized], set[str]]:
    """Find the quantized tensors of a folder.

    Args:
        directory: the folder, for messages.
        config: its config.json.
        stored: its tensors.

    Returns:
        Quantized tensors by the names of what they stand for; and the names that hold their parts and are no
        tensors of the model. Raises CheckpointError where scales are missing or do not fit.
    """
    said = config.get("quantization_config") or {}
    method = said.get("quant_method") if isinstance(said, dict) else said
    if method not in (None, *_METHODS):
        raise CheckpointError(
            29, f"the weights are quantized by {method}", where=f"{directory}, quantization_config",
            why=f"read are {' and '.join(_METHODS)}, and weights that are not quantized",
            next="the folder of the same model in bfloat16")
    block = _block(directory, said if isinstance(said, dict) else {})
    found, parts = dict[str, Quantized](), set[str]()
    for name, tensor in stored.items():
        if name.endswith(BLOCKS) and tensor.dtype == "U8":
            base = name.removesuffix(BLOCKS)
            found[base] = _mxfp4(directory, name, base + SCALES, stored)
            parts |= {name, base + SCALES}
        elif tensor.dtype in _FLOAT8:
            found[name] = _fp8(directory, name, block, stored)
            parts.add(name + SCALE_INV)
    return found, (parts & stored.keys()) - found.keys()


def _block(directory: Path, said: Mapping[str, Any]) -> tuple[int, int]:
    block = said.get("weight_block_size", [BLOCK, BLOCK])
    if not (isinstance(block, list) and len(block) == 2
            and all(type(side) is int and side > 0 for side in block)):
        raise CheckpointError(
            29, f"blocks of {block} numbers have a scale", where=f"{directory}, weight_block_size",
            why="read are blocks of so many rows and columns, such as [128, 128]",
            next="the folder of the same model in bfloat16")
    return block[0], block[1]


def _fp8(directory: Path, name: str, block: tuple[int, int], stored: Mapping[str, StoredTensor]) -> Quantized:
    shape = stored[name].shape
    scales = _scales(directory, name, name + SCALE_INV, stored)
    wanted = tuple(-(-length // side) for length, side in zip(shape, block))
    if len(shape) != 2 or scales.shape != wanted:
        raise _misfit(directory, name, scales.shape, wanted)
    return Quantized(name, name + SCALE_INV, shape, block)


def _mxfp4(directory: Path, name: str, scales: str, stored: Mapping[str, StoredTensor]) -> Quantized:
    shape = stored[name].shape
    found = _scales(directory, name, scales, stored)
    if len(shape) != 4 or shape[-1] != 16 or found.shape != shape[:-1] or found.dtype != "U8":
        raise _misfit(directory, name, found.shape, shape[:-1])
    return Quantized(name, scales, (shape[0], 32 * shape[2], shape[1]), None)


def _scales(directory: Path, name: str, scales: str, stored: Mapping[str, StoredTensor]) -> StoredTensor:
    if scales not in stored:
        raise CheckpointError(
            30, f"{name} has no scales", where=f"{directory}, {scales}",
            why="its numbers mean nothing without them", next="fetch all shards and the index again")
    return stored[scales]


def _misfit(directory: Path, name: str, there: tuple[int, ...], wanted: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        30, f"the scales of {name} do not fit it", where=str(directory),
        why=f"they are {list(there)}, and {list(wanted)} are wanted",
        next="fetch all shards and the index again")

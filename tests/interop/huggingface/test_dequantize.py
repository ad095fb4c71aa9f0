"""Quantized weights: every code has the value of its format, and nothing is read without its scales."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moetrain.errors import CheckpointError
from moetrain.interop.huggingface.dequantize import fp8_values, mxfp4_values
from moetrain.interop.huggingface.folder import open_folder

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]                        # E2M1, by bits without the sign


def fp4_by_hand(blocks, scales):
    """[E, R, G, 16] and [E, R, G] to [E, 32 G, R], number by number."""
    experts, rows, groups, _ = blocks.shape
    found = np.zeros((experts, 32 * groups, rows), dtype=np.float32)
    for e, r, g, byte in np.ndindex(blocks.shape):
        for half, bits in enumerate((blocks[e, r, g, byte] % 16, blocks[e, r, g, byte] // 16)):
            value = (-1.0 if bits > 7 else 1.0) * VALUES[bits % 8] * 2.0 ** (int(scales[e, r, g]) - 127)
            found[e, 32 * g + 2 * byte + half, r] = value
    return found


def test_every_byte_of_mxfp4_has_its_value():
    draw = np.random.default_rng(0)
    blocks = draw.permutation(np.tile(np.arange(256, dtype=np.uint8), 2)).reshape(2, 4, 4, 16)
    scales = draw.integers(100, 150, (2, 4, 4), dtype=np.uint8)
    found = mxfp4_values(torch.from_numpy(blocks), torch.from_numpy(scales))
    np.testing.assert_array_equal(found.numpy(), fp4_by_hand(blocks, scales))


def test_mxfp4_is_what_transformers_computes():
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 135, (2, 6, 3), dtype=torch.uint8)
    theirs = module.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(mxfp4_values(blocks, scales), theirs)


@pytest.mark.parametrize("shape", [(256, 128), (130, 257), (1, 1), (128, 300)])
def test_float8_numbers_are_multiplied_by_the_scale_of_their_block(tmp_path, shape):
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand([-(-length // 128) for length in shape]) + 0.5
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:shape[0], :shape[1]]
    whole = values.float() * spread
    assert torch.equal(fp8_values(values, scales), whole)
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    with open_folder(tmp_path) as folder:
        assert folder.names == ["w"] and folder.dtype("w") == "F32" and folder.shape("w") == shape
        assert torch.equal(folder["w"], whole)
        for first in range(0, shape[0], 37):
            count = min(100, shape[0] - first)
            assert torch.equal(folder.rows("w", first, count), whole[first:first + count])


@pytest.mark.parametrize("tensors, said", [
    ({"w": torch.zeros(3, 3).to(torch.float8_e4m3fn)}, "w has no scales"),
    ({"w": torch.zeros(200, 3).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)},
     "scales of w do not fit"),
    ({"w_blocks": torch.zeros(2, 3, 1, 16, dtype=torch.uint8)}, "w_blocks has no scales"),
    ({"w_blocks": torch.zeros(2, 3, 1, 16, dtype=torch.uint8),
      "w_scales": torch.zeros(2, 3, 2, dtype=torch.uint8)}, "scales of w_blocks do not fit")])
def test_quantized_weights_without_their_scales_are_refused(tmp_path, tensors, said):
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_folder(tmp_path)

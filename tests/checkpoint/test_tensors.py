"""Rows of tensors as a checkpoint holds them."""

from pathlib import Path

import numpy as np
import pytest

from moetrain.checkpoint.tensors import CheckpointTensors
from moetrain.errors import CheckpointError
from moetrain.transform.reader import WeightsReader
from tests.support.checkpoints import flip, payload


def test_rows_are_those_of_the_tensor(checkpoint: Path):
    with CheckpointTensors(checkpoint) as tensors, WeightsReader(checkpoint) as weights:
        for name in weights.names:
            whole = weights[name]
            assert tensors.shape(name) == tuple(whole.shape) == tensors.shapes()[name]
            assert tensors.read(name).tobytes() == whole.numpy().tobytes()
            if whole.ndim > 1:
                np.testing.assert_array_equal(tensors.read(name, 1, 2).view("f4"), whole[1:3].numpy())


def test_damage_is_named(checkpoint: Path):
    flip(payload(checkpoint), payload(checkpoint).stat().st_size - 20)
    with CheckpointTensors(checkpoint) as tensors, pytest.raises(CheckpointError, match="checksum"):
        for name in tensors.shapes():
            tensors.read(name)

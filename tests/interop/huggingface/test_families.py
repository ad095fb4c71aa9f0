"""Models of stock transformers are the same function here, forward and backward, and on the way back.

transformers computes norms and weights of routers in float32, so both are compared in float32.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.model.build import weights_on_meta
from moetrain.parallel.state_shards import state_shards
from tests.support import needs
from tests.support.family_forwards import forward
from tests.support.public_models import (
    OF_FAMILY,
    Stock,
    logits_of,
    ours,
    run_config,
    stock,
    to_ours,
    to_theirs,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
EVERY = sorted(set(OF_FAMILY) & set(FAMILIES))


@cache
def made(model_type: str) -> Stock:
    needs.module("transformers", "hf")
    return stock(model_type, Path(mkdtemp()))


def tokens(rows: int = 3, positions: int = 13) -> Tensor:
    return torch.randint(0, 48, (rows, positions), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", EVERY)
def test_logits_and_every_gradient_are_those_of_transformers(family: str) -> None:
    theirs = made(family)
    config = run_config(theirs.config)
    mine = ours(config, to_ours(config, theirs.tensors, family))
    slopes = torch.randn(3, 13, 48, generator=torch.Generator().manual_seed(2))
    theirs.model.zero_grad()
    expected = theirs.model(tokens()).logits
    (expected * slopes).sum().backward()
    found = logits_of(mine, tokens())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (found * slopes).sum().backward()
    gradients = {f"model.{shard.name}": shard.rows for shard in state_shards(mine, lambda one: one.grad)}
    named = dict(theirs.model.named_parameters())
    checked = 0
    for name, gradient in to_theirs(config, _with_buffers(gradients, mine), family).items():
        if name in named:
            wanted = named[name].grad
            error = (gradient - wanted).norm() / wanted.norm().clamp(min=1e-6)
            assert error < 1e-4, (name, float(error))
            checked += 1
    assert checked


def _with_buffers(gradients: dict[str, Tensor], model) -> dict[str, Tensor]:
    return gradients | {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("family", EVERY)
def test_import_then_export_is_the_identity(family: str) -> None:
    theirs = made(family)
    config = run_config(theirs.config)
    back = to_theirs(config, to_ours(config, theirs.tensors, family), family)
    assert back.keys() == theirs.tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.tensors.items())
    original = {**theirs.config, "unknown_key": {"kept": [1]}}
    assert FAMILIES[family].write_config(config, 48, original) == original
    assert FAMILIES[family].refusals(config) == []


@pytest.mark.parametrize("family", EVERY)
def test_names_of_recent_versions_are_read_too(family: str) -> None:
    """A state dict has the names of memory: there, the experts of a layer are one tensor."""
    theirs = made(family)
    config = run_config(theirs.config)
    expected = to_ours(config, theirs.tensors, family)
    found = to_ours(config, theirs.model.state_dict(), family)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", EVERY)
def test_the_names_are_complete_on_both_sides(family: str) -> None:
    theirs = made(family)
    config = run_config(theirs.config)
    shapes = {name: shard.shape for name, shard in weights_on_meta(config, 48).items()}
    found: dict[str, tuple[int, ...]] = {}
    mine = []
    for maps in FAMILIES[family].tensor_maps(config, 48):
        for one in maps:
            found |= one.shapes_of_theirs(shapes)
            mine += one.ours
    assert sorted(mine) == sorted(shapes)
    assert found == {name: tuple(tensor.shape) for name, tensor in theirs.tensors.items()}


@pytest.mark.parametrize("family", EVERY)
def test_the_function_is_that_of_the_published_formulas(family: str) -> None:
    theirs = made(family)
    config = run_config(theirs.config, "float64")
    wide = {name: tensor.double() for name, tensor in theirs.tensors.items()}
    mine = ours(config, to_ours(config, wide, family))
    ids = tokens(1)
    expected = forward(theirs.config, {name: tensor.numpy() for name, tensor in wide.items()}, ids[0].numpy())
    with torch.no_grad():
        found = logits_of(mine, ids)[0]
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_modules_that_predict_further_are_layers_behind_the_last(family: str) -> None:
    """Every tensor of a model that trains them has its name; copies of embedding and head must be equal."""
    bare = run_config(made(family).config)
    config = replace(bare, model=replace(bare.model, mtp_layers=1))
    mine = {name: torch.randn(shard.shape) for name, shard in weights_on_meta(config, 48).items()}
    back = to_theirs(config, mine, family)
    behind = f"model.layers.{config.model.num_layers}."
    assert {f"{behind}{name}.weight" for name in (
        "enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head",
        "mlp.gate")} <= back.keys()
    assert torch.equal(back[f"{behind}shared_head.head.weight"], back["lm_head.weight"])
    again = to_ours(config, back, family)
    assert again.keys() == mine.keys() and all(torch.equal(again[name], mine[name]) for name in mine)
    written = FAMILIES[family].write_config(config, 48, made(family).config)
    assert written["num_nextn_predict_layers"] == 1 and FAMILIES[family].refusals(config) == []
    assert "model.mtp_layers" in [key for key, _ in FAMILIES["mixtral"].refusals(config)]
    with pytest.raises(CheckpointError, match="E-CHECKPOINT-038"):
        to_ours(config, {**back, f"{behind}embed_tokens.weight": torch.zeros(48, 16)}, family)

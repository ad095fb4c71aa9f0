"""Imported models generate, train on, run on every mesh, and load in transformers again."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor

from moetrain.config.schema import Config
from moetrain.generate.sample import IncrementalModel, text_key
from moetrain.interop.huggingface.exporting import export_weights
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.folder import open_folder
from moetrain.interop.huggingface.folder_writer import FolderWriter
from moetrain.interop.huggingface.importing import import_folder
from moetrain.interop.huggingface.logits_check import compare_logits
from moetrain.model.build import build_model, weights_on_meta
from moetrain.parallel.state_shards import weights
from moetrain.train.checkpoint.load import load_weights
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.step import train_step
from moetrain.transform import open_weights, write_run
from tests.support import needs
from tests.support.public_models import (
    OF_FAMILY,
    Stock,
    logits_of,
    ours,
    run_config,
    stock,
    to_ours,
    to_theirs,
    write_folder,
)

EVERY = sorted(set(OF_FAMILY) & set(FAMILIES))
PROMPT = torch.tensor([7, 3, 40, 21, 3])


@pytest.fixture(scope="module")
def made():
    """made(family): a model of transformers, made once."""
    needs.module("transformers", "hf")
    found: dict[str, Stock] = {}

    def get(family: str) -> Stock:
        if family not in found:
            found[family] = stock(family, Path(mkdtemp()))
        return found[family]

    return get


@pytest.mark.parametrize("family", EVERY)
def test_generation_with_the_cache_is_that_of_transformers(made, family: str) -> None:
    theirs = made(family)
    expected = theirs.model.generate(PROMPT[None], max_new_tokens=32, do_sample=False)[0]
    config = run_config(theirs.config)
    model = IncrementalModel(ours(config, to_ours(config, theirs.tensors, family)), 64, key=text_key(0, 0, 0),
                             cache=True)
    assert model.cache is not None
    ids = PROMPT
    for _ in range(32):
        ids = torch.cat([ids, model.logits(ids).argmax()[None]])
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("family", EVERY)
def test_a_model_of_ours_loads_in_transformers(made, family: str, tmp_path: Path) -> None:
    """With a config.json that follows from our config alone; no tensor is missing, none unexpected."""
    from transformers import AutoModelForCausalLM

    theirs = made(family)
    config = run_config(theirs.config)
    tensors = to_ours(config, theirs.tensors, family)
    config_json = FAMILIES[family].from_config(config, 48)
    write_folder(tmp_path, config_json, to_theirs(config, tensors, family))
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True,
                                                       dtype=torch.float32)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    ids = torch.randint(0, 48, (2, 11))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, theirs.model(ids).logits)
    assert type(model).__name__ == FAMILIES[family].architecture


def logits_on_a_mesh(config: Config, checkpoint: Path, ids: Tensor) -> Tensor:
    """Logits of one rank of a mesh that loads the weights."""
    mesh = join(config)
    model = build_model(config, 48, mesh)
    load_weights(model, checkpoint, mesh, verify="full")
    with torch.no_grad():
        return logits_of(model.eval(), ids)


def test_a_model_that_predicts_further_passes_the_check_of_its_logits(made, tmp_path: Path) -> None:
    """Stock transformers has no place for its modules, which lie behind the last layer."""
    bare = run_config(made("deepseek_v3").config)
    config = replace(bare, model=replace(bare.model, mtp_layers=1))
    shapes = {name: shard.shape for name, shard in weights_on_meta(config, 48).items()}
    run = write_run(tmp_path / "run", config, ((name, 0.1 * torch.randn(shape)) for name, shape in
                                               shapes.items()), vocab_size=48)
    family = FAMILIES["deepseek_v3"]
    with open_weights(run) as reader, FolderWriter(tmp_path / "out") as writer:
        export_weights(reader, family, writer)
        writer.write("config.json", json.dumps(family.from_config(config, 48)))
    maps = [one for layer in family.tensor_maps(config, 48) for one in layer]
    with open_weights(run) as reader:
        found = compare_logits(reader, maps, tmp_path / "out", {}, torch.randint(0, 48, (2, 11)))
    assert found["max_abs_delta"] <= found["tolerance"] and not found["unexpected_keys"]


CASES = [("mixtral", "ep"), ("qwen3_moe", "fssdp")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = [(family, mesh) for family in EVERY for mesh in ("ep", "fssdp")]
        cases = every if metafunc.config.getoption("--all") else CASES
        metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


@pytest.mark.ranks
def test_logits_are_the_same_on_every_mesh(made, ranks, case: tuple[str, str], tmp_path: Path) -> None:
    family, mesh = case
    theirs = made(family)
    config = run_config(theirs.config, "float32", f"parallel={mesh}", "run.nproc=2")
    with open_folder(theirs.folder) as folder:
        checkpoint = import_folder(folder, tmp_path / "run", family=FAMILIES[family], config=config)
    ids = torch.randint(0, 48, (2, 11), generator=torch.Generator().manual_seed(3))
    expected = theirs.model(ids).logits.detach()
    for found in ranks(2).run(logits_on_a_mesh, config, checkpoint, ids):
        torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-5)


def test_training_goes_on_as_in_transformers(made) -> None:
    """Twenty steps of AdamW on the same batches: the losses are those of transformers to 1e-4."""
    theirs = made("qwen3_moe")
    overrides = ["train.global_batch=8", "train.seq_len=16", "train.clip=0", "balance=none", "optim=adamw",
                 "optim.lr=3e-3", "optim.warmup=0",
                 "optim.schedule=wsd", "optim.decay=0", "optim.weight_decay=0", "run.steps=20"]
    config = run_config(theirs.config, "float32", *overrides)
    run = set_up(config, Path("unused"), join(config))
    tensors = to_ours(config, theirs.tensors, "qwen3_moe")
    with torch.no_grad():
        for shard in weights(run.state.model):
            shard.rows.copy_(tensors[shard.name])
    model = stock("qwen3_moe", Path(mkdtemp())).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    for step in range(1, 21):
        (batch,) = run.loader.step(step)
        found = train_step(run, step).metrics["loss/ce"]
        logits = model(batch.tokens_BS).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(),
                                                 ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found == pytest.approx(float(loss), abs=1e-4), step

"""Every recipe composes, trains and is what docs/howto/recipes.md says.

A run of a large model without a recipe is told of one.
"""

import re
from pathlib import Path

import pytest
import torch

from moetrain.__main__ import main
from moetrain.comm.mesh import build_mesh, mesh_sizes
from moetrain.config.compose import compose
from moetrain.config.groups import config_dir, group_options
from moetrain.config.recipes import advice
from moetrain.config.schema import Config
from moetrain.config.size_check import Available, too_large
from moetrain.config.sizes import count_parameters, rank_memory
from moetrain.model import build
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.step import train_step
from moetrain.units import size
from tests.support.runs import ROOT

PAGE = (ROOT / "docs" / "howto" / "recipes.md").read_text()
RECIPES = [name for name in group_options()["experiment"] if name not in ("debug", "quickstart")]
VOCABULARY = {"laptop": 257, "qwen3_16xh100": 151936}
G = 10**9
MEMORY = {"laptop": Available(8 * G), "gpu_24gb": Available(32 * G, 24 * G)}
# What a recipe is cut down to, all of its keys as they are but for sizes and text.
REDUCED = ["data=synthetic", "data.vocab_size=64", "run.device=cpu", "run.nproc=1", "log.wandb=off",
           "model.dim=32", "model.num_layers=2",
           "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=8", "model.num_experts=16",
           "model.expert_dim=16", "train.seq_len=16", "train.global_batch=4", "train.micro_batch=2",
           "train.head_chunk=8"]


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of the first table below `heading`, by recipe."""
    table = re.search(r"(?:^\|.*\n)+", PAGE[PAGE.index(heading):], re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in cells}


def whole(name: str) -> tuple[Config, int]:
    """With the dtype that run.dtype=auto is on a CPU."""
    return (compose([f"experiment={name}", *["run.dtype=float32"] * (name == "laptop")]),
            VOCABULARY.get(name, 50304))


def reduced(name: str) -> Config:
    """One process for all: a mesh of one rank, and so no expert on another."""
    parallel = ["parallel.ep=1", "parallel.shard=1"] if whole(name)[0].parallel.mode == "ep_fsdp" else []
    return compose([f"experiment={name}", *REDUCED, *parallel])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_two_steps(name: str) -> None:
    config = reduced(name)
    run = set_up(config, Path("unused"), join(config))
    losses = [train_step(run, step).metrics["loss/ce"] for step in (1, 2)]
    assert all(torch.isfinite(torch.tensor(losses))) and run.state.step == 2
    assert run.state.model.dtype == (torch.float32 if name == "laptop" else torch.bfloat16)


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_has_the_numbers_of_the_model_on_the_meta_device(
        name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "initialize", lambda *arguments, **options: None)
    config, vocabulary = whole(name)
    model = build.build_model(config, vocabulary,
                              build_mesh(mesh_sizes("single", 1, None), torch.device("meta")))
    counted = count_parameters(config.model, vocabulary)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    train, digits = config.train, 5 if name == "laptop" else 3
    assert rows("# Recipes")[name][1:] == [
        f"{counted.total / 1e9:.{digits}f} B", f"{counted.active / 1e9:.{digits}f} B",
        f"{vocabulary:,}{' (bytes)' * (name == 'laptop')}",
        f"{train.global_batch * train.seq_len:,}", f"{config.run.steps:,}", f"{train.seq_len:,}"]
    memory, there = (rank_memory(config, vocabulary, config.run.nproc),
                     MEMORY.get(name, Available(100 * G, 80 * G)))
    shown = [size(memory.state), size(memory.activations), size(memory.logits),
             size(memory.total - memory.tokens), size(there.gpu or 0),
             size(12 * counted.total)]
    assert rows("## Memory")[name] == (shown if there.gpu else [*shown[:4], "", shown[5]])
    # A quarter stays for what the formula leaves out
    assert memory.total < 0.75 * (there.gpu or there.host)
    assert too_large(config, config.run.nproc, there, vocabulary) is None


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_of_a_recipe_has_its_reason(name: str) -> None:
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    values = [line for line in text.splitlines() if re.match(r"\s+(- )?\w.*:.*\S", line.partition("#")[0])]
    assert values and all("#" in line for line in values) and name in PAGE
    saved = compose([f"experiment={name}"]).checkpoint
    assert saved.interval > 0


def test_a_large_model_with_small_settings_is_told_once(capsys: pytest.CaptureFixture, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    text = advice(compose(["model=qwen3_30b_a3b", "run.dtype=float32", "run.steps=100"]))
    for setting in ("run.dtype=float32 (bfloat16)", "train.seq_len=128 (4096)", "run.steps=100 (20000)",
                    "data.tokenizer=bytes",
                    "built-in corpus", "experiment=qwen3_16xh100"):
        assert setting in text
    assert "experiment=olmoe_8xh100" in advice(compose(["model=olmoe_1b_7b", "data.path=x"]))
    assert advice(compose([])) is None and advice(compose(["experiment=debug", "run.dtype=float32"])) is None
    assert advice(compose(["experiment=olmoe_8xh100", "data.path=x", "data.tokenizer=y"])) is None
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "--dry-run", "--nodes=2", "--gpus-per-node=8", "parallel=ep_fsdp",
                 "model=qwen3_30b_a3b"]) == 0
    assert capsys.readouterr().err.count("[warn]") == 1

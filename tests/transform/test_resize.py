"""Experts that stay, go or are added: parameters, moments, rows of routers and biases move together."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from moetrain.__main__ import main
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.report.specialization import read_specialization
from moetrain.train.checkpoint.load import resume
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.step import train_step
from moetrain.transform import WeightsReader, most_used, open_weights, resize_experts, write_run
from tests.support.any_router import router_of
from tests.support.trained_run import losses, records, train

BANKS = ("layers.0.moe", "layers.2.moe")


def resized(name: str, source: str = "mine", **how) -> Path:
    return resize_experts(source, f"runs/{name}", **how)


def gone_on(name: str) -> list[dict]:
    """Two more steps of a run, and their metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.cli.train.draw", lambda directory: None)
        assert main(["train", name, "run.steps=5", "log.interval=1"]) == 0
    lines = (json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["step"] > 3]


@pytest.fixture(scope="module")
def moved(place: Path) -> str:
    """A run in float64, with biases that have moved."""
    train(place, "router=sigmoid", "model.num_layers=3", "model.moe_layers=[0,2]", "run.name=moved",
          "run.dtype=float64", "router.update_rate=0.01", "optim.lr=1e-2", "eval.interval=0")
    return "moved"


def test_experts_in_another_order_train_alike(moved: str) -> None:
    resized("turned", moved, keep=[3, 1, 0, 2, 7, 6, 5, 4])
    shutil.copytree(Path("runs") / moved, "runs/unturned")
    ours, expected = gone_on("turned"), gone_on("unturned")
    assert [line["step"] for line in ours] == [4, 5]
    for mine, other in zip(ours, expected, strict=True):
        for name in ("loss/total", "loss/ce", "loss/balance", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-10), name
    assert ours[0]["tokens"] == expected[0]["tokens"]


def two_steps(run_dir: Path, parallel: list[str]) -> list[dict[str, float]]:
    """Go on with a run on the mesh of this rank, without its files."""
    config = compose([str(run_dir), *parallel, "run.steps=5"])
    run = set_up(config, Path("unused"), join(config))
    resume(run.state, run_dir, run.mesh)
    return [train_step(run, step).metrics for step in (4, 5)]


@pytest.mark.ranks
def test_the_new_sizes_train_alike_on_another_mesh(ranks, moved: str) -> None:
    """Three of eight stay, and three are added: on one rank, and three on each of two."""
    run_dir = Path("runs/grown").absolute()
    checkpoint = resized(run_dir.name, moved, keep=[6, 0, 3], add=3)
    assert checkpoint.name == "step-00000003"
    mesh = ["parallel=fssdp", "run.nproc=2"]
    ours, expected = ranks(2).run(two_steps, run_dir, mesh)[0], two_steps(run_dir, [])
    for mine, other in zip(ours, expected, strict=True):
        for name in ("loss/total", "loss/ce", "loss/balance", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-10), name


def test_what_stays_moves_together_and_what_is_new_starts(moved: str) -> None:
    resized("some", moved, keep={BANKS[0]: [6, 3]}, add={BANKS[0]: 1, BANKS[1]: 2})
    with open_weights("some") as found, open_weights(moved) as source:
        assert found.config.model.num_experts == [3, 8, 10]
        assert found.manifest.values == source.manifest.values
        for tensor in ("model.{}.router.weight", "optim.{}.router.weight.exp_avg", "buffer.{}.router.bias"):
            first, second = (tensor.format(bank) for bank in BANKS)
            assert found[first][:2].equal(source[first][[6, 3]]) and source[first].any()
            assert found[second][:8].equal(source[second])
            assert not found[second][8:].any() or tensor.startswith("model.")
        for matrix in ("gate_up", "down"):
            expert = "{}.{}.experts.{}." + matrix
            for new, old in enumerate([6, 3]):
                assert found[expert.format("model", BANKS[0], new)].equal(
                    source[expert.format("model", BANKS[0], old)])
            fresh, moment = expert.format("model", BANKS[0], 2), expert.format("optim", BANKS[0], 2)
            assert 0.5 < found[fresh].std() / source[fresh].std() < 2
            assert not found[fresh].equal(source[fresh]) and not found[f"{moment}.exp_avg"].any()
        assert found["model.embed"].equal(source["model.embed"])


def never_chosen(source: WeightsReader, experts: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Weights of the source, in which no token chooses these experts."""
    for name, tensor in source:
        if name.endswith(".router.bias"):
            tensor[experts] = -1e9
        yield name, tensor


def test_experts_that_nobody_chooses_come_and_go_without_a_trace() -> None:
    with open_weights("mine") as source:
        write_run("runs/masked", source.config, never_chosen(source, [2, 5]), source=source)
    resized("pruned", "masked", keep=[0, 1, 3, 4, 6, 7])
    resized("added", "pruned", add=3)
    with open_weights("added") as source:
        write_run("runs/expanded", source.config, never_chosen(source, [6, 7, 8]), source=source)
    seen = []
    for name in ("masked", "pruned", "expanded"):
        assert main(["eval", name]) == 0
        seen.append(losses(records(Path("runs") / name)[-1]))
    assert seen[0] == seen[1] == seen[2]


def test_the_most_used_stay() -> None:
    assert most_used(np.array([4, 0, 9, 4, 1]), 3) == (0, 2, 3)


def test_the_command_keeps_the_most_used_of_a_domain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "resize", "mine", "to=notes", "keep=3", "domain=notes", "add=1"]) == 0
    assert "moetrain train notes" in capsys.readouterr().out
    used = read_specialization(Path("runs/mine/specialisation.npz"))
    row = used.domains.index("notes")
    with open_weights("notes") as found:
        resized = found.manifest.facts["transform"]["experts"]
        assert found.config.model.num_experts == 4 and found.config.run.name == "notes"
    for bank in BANKS:
        assert resized[bank] == {"keep": list(most_used(used.choices[bank][row], 3)), "add": 1}


def test_an_argument_of_the_router_follows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, "router=cosine", "run.name=cosine", "run.steps=1")
    assert main(["checkpoint", "resize", "cosine", "to=refused", "add=4"]) == 2
    said = capsys.readouterr().err
    assert "E-CONFIG-278" in said and "router.projection" in said and not Path("runs/refused").exists()
    assert main(["checkpoint", "resize", "cosine", "to=wide_cosine", "add=4", "router.proj_dim=4"]) == 0
    with open_weights("wide_cosine") as found, open_weights("cosine") as source:
        name = "model.layers.0.moe.router.projection"
        assert found[name].equal(source[name])
        assert found.config.router["proj_dim"] == 4 and found.config.model.num_experts == 12


@pytest.mark.parametrize("option, overrides", [*((option, []) for option in group_options()["router"]),
                                               ("topk", ["router.noise=normal", "router.logit_bias=true"])])
def test_what_depends_on_the_number_of_experts_is_declared(option: str, overrides: list[str]) -> None:
    routers = [router_of(option, overrides, experts) for experts in (8, 12)]
    few, many = (router.state_dict() for router in routers)
    differ = {name for name, tensor in few.items() if tensor.shape != many[name].shape}
    declared = routers[0].choice_tensors & few.keys()
    assert differ == declared | ({"projection"} & few.keys())         # of cosine, as wide as half the experts
    assert all(len(few[name]) + 4 == len(many[name]) for name in declared)


@pytest.mark.parametrize("words, code", [
    (["keep=3"], 280), (["to=refused", "keep=x"], 280), (["to=refused", "keep=1,2"], 280),
    (["to=refused", "add=[1]"], 280), (["to=refused", "keep=9"], 276),
    (["to=refused", "keep=3", "domain=note"], 281), (["to=mine", "add=1"], 322),
])
def test_words_that_cannot_be_are_named(words: list[str], code: int,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "resize", "mine", *words]) == 2
    assert f"E-CONFIG-{code}" in capsys.readouterr().err and not Path("runs/refused").exists()


@pytest.mark.parametrize("how, says", [
    ({"keep": [0, 8]}, "layers.0.moe cannot keep expert 8"),
    ({"keep": [1, 1]}, "layers.0.moe cannot keep expert 1"),
    ({"keep": []}, "would keep 0 experts"),
    ({"add": 0}, "every expert stays"),
    ({"add": {"layers.1.moe": 1}}, "there is no bank of experts layers.1.moe"),
    ({"keep": 3}, "it is not known how often"),
    ({"keep": [4]}, "model.top_k=2 is more than model.num_experts=1"),
])
def test_what_cannot_be_is_refused_and_leaves_nothing(how: dict, says: str) -> None:
    with pytest.raises((ConfigError, ConfigErrors)) as caught:
        resized("refused", **how)
    assert says in str(caught.value) and not Path("runs/refused").exists()


def test_a_router_that_knows_experts_by_their_ids_is_refused(place: Path) -> None:
    train(place, "router=hash", "run.name=by_id", "run.steps=1")
    with pytest.raises(ConfigError, match="HashRouter knows experts by their ids"):
        resized("refused", "by_id", add=1)
    assert not Path("runs/refused").exists()


def test_attention_experts_are_resized_by_the_name_of_their_bank(place: Path) -> None:
    train(place, "model.attention=experts", "model.num_attention_experts=4", "run.name=heads", "run.steps=1")
    banks = [f"layers.{layer}.attention" for layer in range(2)]
    resized("fewer_heads", "heads", keep=dict.fromkeys(banks, [3, 0]), add=dict.fromkeys(banks, 1))
    with open_weights("fewer_heads") as found, open_weights("heads") as source:
        assert (found.config.model.num_attention_experts, found.config.model.num_experts) == (3, 8)
        for bank in banks:
            for name in (f"model.{bank}.experts.{{}}.queries", f"optim.{bank}.experts.{{}}.outputs.exp_avg"):
                assert found[name.format(0)].equal(source[name.format(3)])
            assert found[f"model.{bank}.router.weight"][:2].equal(
                source[f"model.{bank}.router.weight"][[3, 0]])
    with pytest.raises(ConfigError, match="different numbers of attention experts"):
        resized("refused", "heads", add={banks[0]: 1})

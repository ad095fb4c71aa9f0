"""Every feature of training on one simulated CUDA device: the CPU's losses, norm, counts and parameters.

A few runs cover them together. What meshes add is in test_simulated_device.py, what whole runs add (saves,
evaluation, generation, records) in test_device_runs.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from moetrain.config.compose import compose
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.step import train_step
from tests.support import simulated_device, small_text
from tests.support.device_process import DeviceProcess
from tests.support.training import difference, snapshot, whole

UNAVAILABLE = simulated_device.unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "there is one")

STEPS = 2                                    # in the second the mode warm shows, and moments of the optimizer
BASE = ["optim=adamw", "optim.lr=1e-2", "optim.warmup=2", "run.steps=20", "train.global_batch=16",
        "train.seq_len=12", "train.clip=0.5", "model.dim=16", "model.num_layers=2", "model.expert_dim=16",
        "model.num_experts=8", "model.init_std=0.2", "log.wandb=off"]
SYNTHETIC = ["data=synthetic", "data.vocab_size=48"]
ACCUMULATED = ["train.micro_batch=4"]
FEATURES: dict[str, list[str]] = {
    "topk": ["router=topk"],
    "topk, raw weights": ["router=topk", "router.weights=raw"],
    "topk, softmax of the chosen": ["router=topk", "router.weights=softmax_of_topk"],
    "topk in groups": ["router=topk", "router.num_groups=4", "router.topk_groups=2"],
    "sigmoid": ["router=sigmoid", "router.update_rate=0.05"],
    "sigmoid in groups": ["router=sigmoid", "router.num_groups=4", "router.topk_groups=2"],
    "sigmoid, counts of micro-batches": ["router=sigmoid", "router.counts=micro", "router.update_rate=0.05"],
    "capacity by position": ["capacity=position", "capacity.factor=1", "capacity.renorm=true"],
    "capacity by probability": ["capacity=prob", "capacity.factor=1", "capacity.scope=local"],
    "balance in nodes": ["balance=node", "balance.weight=0.1"],
    "balance in micro-batches": ["balance=micro", "balance.weight=0.1"],
    "balance in sequences": ["balance=sequence", "balance.weight=0.1"],
    "no balance": ["balance=none"],
    "exact, graphs kept": [*ACCUMULATED, "balance.mode=exact", "train.count_pass=false"],
    "exact, count pass": [*ACCUMULATED, "balance.mode=exact", "train.count_pass=true"],
    "sync": [*ACCUMULATED, "balance.mode=sync"],
    "buffer": [*ACCUMULATED, "balance.mode=buffer"],
    "warm": [*ACCUMULATED, "balance.mode=warm"],
    "z": ["loss=[z]", "loss.z.weight=0.01"],
    "z and micro balance": ["loss=[z,micro_balance]"],
    "attached": ["train.aux_loss=injected"],
    "selective recomputation": ["train.activation_checkpointing=selective"],
    "full recomputation": ["train.activation_checkpointing=full"],
    "muon": ["optim=muon", "optim.warmup=2"],
    "muon in bfloat16": ["optim=muon", "optim.muon_precision=bfloat16", "optim.warmup=2"],
    "head in chunks": ["train.head_chunk=20"],
    "documents": ["data=text", "data.mask_documents=true"],
    "shared experts": ["model.num_shared_experts=2"],
    "dense layers": ["model.num_layers=3", "model.first_dense_layers=1"],
    "layers of their own": ["model.num_experts=[8,12]", "model.top_k=[3,2]"],
    "odd widths": ["model.dim=20", "model.num_heads=2", "model.num_kv_heads=1", "model.expert_dim=13"],
    "norms on queries and keys": ["model.qk_norm=head"],
    "tied embeddings": ["model.tie_embeddings=true"],
    "padding": ["data.min_length=0.3"],
    "float64": ["run.dtype=float64"],
    "bfloat16": ["run.dtype=bfloat16"],
}
COVERING: list[tuple[str, ...]] = [
    ("sigmoid in groups", "capacity by position", "sync", "attached", "z", "full recomputation", "documents"),
    ("topk in groups", "capacity by probability", "balance in nodes", "exact, count pass",
     "selective recomputation", "head in chunks"),
    ("float64", "odd widths", "topk, raw weights", "balance in sequences", "muon", "padding"),
    ("bfloat16", "sigmoid, counts of micro-batches", "exact, graphs kept", "muon in bfloat16",
     "shared experts"),
    ("topk, softmax of the chosen", "warm", "z and micro balance", "dense layers", "tied embeddings"),
    ("topk", "buffer", "attached", "layers of their own", "norms on queries and keys"),
    ("sigmoid", "balance in micro-batches", "full recomputation"),
    ("no balance", "bfloat16", "selective recomputation"),
]
# Relative: of losses and norm; of a parameter's largest value, which AdamW divides by what may be small.
TOLERANCE = {"float64": (1e-10, 1e-8), "float32": (1e-5, 1e-3), "bfloat16": (2e-2, 0.1)}


class Trained(NamedTuple):
    metrics: list[dict[str, float]]
    counts: list[dict[str, list[int]]]
    parameters: dict[str, Tensor]            # whole, on the host
    device: str                              # of the parameters


@pytest.fixture(scope="module")
def device() -> Iterator[DeviceProcess]:
    with DeviceProcess() as process:
        yield process


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that are shorter than a sequence, and longer."""
    return small_text.write(tmp_path_factory.mktemp("text"))


def train(overrides: list[str], directory: Path, device: str) -> Trained:
    config = compose([*BASE, *overrides, f"run.device={device}"])
    run = set_up(config, directory / device, join(config))
    results = [train_step(run, step) for step in range(1, STEPS + 1)]
    counts = [{name: count.tolist() for name, count in result.counts.items()} for result in results]
    parameters = whole([snapshot(run, lambda parameter: parameter.data.cpu())])
    (where,) = {parameter.device.type for parameter in run.state.model.parameters()}
    return Trained([result.metrics for result in results], counts, parameters, where)


def test_the_runs_cover_all_features() -> None:
    assert {feature for features in COVERING for feature in features} == FEATURES.keys()


@pytest.mark.parametrize("features", COVERING, ids=lambda features: features[0])
def test_a_device_computes_what_the_cpu_does(features: tuple[str, ...], device: DeviceProcess, text: Path,
                                             tmp_path: Path) -> None:
    words = [word for feature in features for word in FEATURES[feature]]
    words += [f"data.path={text}"] if "data=text" in words else SYNTHETIC
    dtype = next((word.partition("=")[2] for word in words if word.startswith("run.dtype=")), "float32")
    running = device.start(train, [*words, f"run.dtype={dtype}"], tmp_path, "cuda")
    theirs = train([*words, f"run.dtype={dtype}"], tmp_path, "cpu")
    ours = running.result()
    assert (ours.device, theirs.device) == ("cuda", "cpu")
    numbers, parameters = TOLERANCE[dtype]
    if dtype != "bfloat16":                              # rounded so, two experts are equal more often
        assert ours.counts == theirs.counts
    for mine, other in zip(ours.metrics, theirs.metrics):
        assert mine.keys() == other.keys()
        for name in mine:
            if name.startswith(("loss/", "grad_norm", "moe/entropy", "moe/drop_fraction")):
                assert mine[name] == pytest.approx(other[name], rel=numbers, abs=numbers), name
    assert difference(ours.parameters, theirs.parameters)[0] < parameters

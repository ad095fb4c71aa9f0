"""Sizes are multiplied before anything starts: what no machine holds is refused, what might fit never is."""

from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.config.compose import compose
from moetrain.config.size_check import Available, too_full, too_large
from moetrain.errors import ConfigErrors
from moetrain.launch.node import config_for

G = 2**30
LAPTOP = Available(24 * G)
ABSURD = {
    "model.dim": ["model.dim=100000", "model.num_layers=40"],
    "train.global_batch": ["train.global_batch=1000000000000"],
    "train.global_batch, a sequence at a time": ["train.global_batch=1000000000000", "train.micro_batch=1"],
    "train.seq_len": ["train.seq_len=100000000000"],
    "model.num_experts": ["model.num_experts=1000000000"],
    "model.num_layers": ["model.num_layers=100000000"],
    "model.expert_dim": ["model.expert_dim=10000000000"],
    "eval.windows": ["eval.windows=100000000000", "data=synthetic"],
    "data.num_domains": ["data.num_domains=100000000000", "data=synthetic"],
    "data.vocab_size": ["data.vocab_size=100000000000", "data=synthetic"],
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_refused_and_the_advice_fits(name: str) -> None:
    key, words = name.partition(",")[0], ABSURD[name]
    error = too_large(compose(words), 1, LAPTOP)
    assert error is not None and error.id == "E-CONFIG-181" and f"{key}=" in error.where
    assert "24.0G" in error.what
    assert error.next.startswith(f"{key}=") and "take" in error.why
    assert too_large(compose([*words, error.next]), 1, LAPTOP) is None


@pytest.mark.parametrize("words, rank_memory, ranks", [
    ([], Available(G), 1), (["experiment=quickstart"], Available(G), 1),
    (["experiment=debug"], Available(G // 4), 1),
    (["model=olmoe_1b_7b", "run.device=cuda", "train.micro_batch=1"], Available(64 * G, 80 * G), 1),
    (["model=qwen3_30b_a3b", "parallel=ep_fsdp"], Available(64 * G, 80 * G), 16),
    (["model=deepseek_v3", "parallel=fsdp", "train.global_batch=256"], Available(64 * G, 80 * G), 256),
    (["model=deepseek_v3", "parallel=ep_fsdp", "parallel.ep=8", "train.global_batch=256"],
     Available(64 * G, 80 * G), 256)])
def test_what_fits_is_not_refused(words: list[str], rank_memory: Available, ranks: int) -> None:
    assert too_large(config_for(words, ranks), ranks, rank_memory) is None


@pytest.mark.parametrize("words, ranks",
                         [(["model=deepseek_v3"], 1), (["model=deepseek_v3", "parallel=ddp"], 16),
                                          (["model=deepseek_v3", "parallel=ep"], 16)])
def test_a_model_for_many_gpus_is_not_for_one(words: list[str], ranks: int) -> None:
    """Shards count: without sharding of the dense part each rank holds all of it."""
    error = too_large(config_for(words, ranks), ranks, Available(64 * G, 80 * G))
    assert error is not None and "GPU of 80.0G" in error.what and error.next


def test_a_gpu_that_others_fill_is_named_with_what_is_free() -> None:
    config = config_for(["model=olmoe_1b_7b", "run.device=cuda", "train.micro_batch=1"], 1)
    assert too_large(config, 1,
                     Available(200 * G, 141 * G)) is None and too_full(config, 1, 141 * G, 139 * G) is None
    error = too_full(config, 1, 141 * G, 3 * G)
    assert error is not None and error.id == "E-CONFIG-111" and "its GPU has 3.0G free" in error.what
    assert error.why == "other programs hold 138G of its 141G" and "nvidia-smi" in error.next
    assert "CUDA_VISIBLE_DEVICES" in error.next


def test_rules_between_keys_answer_whatever_the_sizes_are() -> None:
    """No list of all layers, and no trial division up to the number itself."""
    for words in (["model.num_layers=100000000", "model.num_experts=[1,2]"], ["model.dim=1000000000001"],
                  ["model.num_experts=1000000000", "router.num_groups=3"],
                  ["parallel=ep", "run.nproc=1000000007"],
                  ["model.num_heads=100000000003", "model.num_kv_heads=2"]):
        with pytest.raises(ConfigErrors):
            compose(words)


def test_the_command_refuses_before_anything_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=debug", "run.device=cpu", "model.num_layers=100000000"]) == 2
    assert "E-CONFIG-181" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert main(["train", "experiment=debug", "model.num_layers=100000000", "--cfg", "job"]) == 0

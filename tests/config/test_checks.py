"""Each rule between keys raises, with its own number and advice that works."""

import importlib
import inspect
import pkgutil
import re

import pytest

from moetrain.config import checks, rules
from moetrain.config.compose import compose
from moetrain.config.rules.model import moe_layers
from moetrain.errors import ConfigErrors

LONGROPE = ("model.rope_scaling={type: longrope, factor: 4, original_max_position_embeddings: 64, "
            "short_factor: [1], long_factor: [2]}")
# overrides, number, what the advice says, overrides that follow the advice
BROKEN = [
    (["run.steps=0"], 20, "run.steps=800", ["run.steps=1"]),
    (["optim.lr=0"], 20, "optim.lr=0.003", ["optim.lr=1e-3"]),
    (["optim.lr=nan"], 20, "optim.lr=0.003", ["optim.lr=1e-3"]),
    (["optim.lr=inf"], 20, "optim.lr=0.003", ["optim.lr=1e-3"]),
    (["generate.top_p=0"], 20, "generate.top_p=0.95", ["generate.top_p=1.0"]),
    (["generate.temperature=-1"], 20, "generate.temperature=0.8", ["generate.temperature=0"]),
    (["data=synthetic", "data.min_length=1.5"], 20, "data.min_length=1", ["data.min_length=1"]),
    (["parallel=fssdp", "parallel.max_forecast_error=1.001"], 20, "parallel.max_forecast_error=0.15",
     ["parallel.max_forecast_error=0"]),
    (["optim.betas=[0.9,1.0]"], 20, "[0.9,0.95]", ["optim.betas=[0.9,0.95]"]),
    (["run.name=a/b"], 21, "run.name=demo", ["run.name=demo"]),
    (["run.stop_at=900"], 22, "run.steps=900", ["run.steps=900"]),
    (["model.num_kv_heads=3"], 23, "from 1, 2, 4", ["model.num_kv_heads=4"]),
    (["model.dim=66"], 24, "model.head_dim", ["model.head_dim=16"]),
    (["model.head_dim=15"], 25, "model.head_dim=16", ["model.head_dim=16"]),
    (["model.partial_rotary_factor=0.1"], 296, "model.partial_rotary_factor=0.0625",
     ["model.partial_rotary_factor=0.0625"]),
    (["model.rope_scaling={factor: 4}"], 295, "model.rope_scaling.type=yarn",
     ["model.rope_scaling={type: linear, factor: 4}"]),
    (["model.rope_scaling={type: ntk}"], 295, "model.rope_scaling.type=yarn", ["model.rope_scaling={}"]),
    (["model.rope_scaling={type: yarn, factor: 4}"], 295,
     "model.rope_scaling.original_max_position_embeddings=<value>",
     ["model.rope_scaling.original_max_position_embeddings=64"]),
    (["model.rope_scaling={type: linear, factor: 4, beta_fats: 3}"], 295, "~model.rope_scaling.beta_fats",
     ["~model.rope_scaling.beta_fats"]),
    (["model.rope_scaling={type: linear, factor: -4}"], 295, "model.rope_scaling.factor=<value>",
     ["model.rope_scaling.factor=4"]),
    (["model.rope_scaling={type: llama3, factor: 4, original_max_position_embeddings: 64, "
      "low_freq_factor: 4, high_freq_factor: 1}"], 295, "model.rope_scaling.high_freq_factor=16",
     ["model.rope_scaling.high_freq_factor=16"]),
    ([LONGROPE.replace("[2]", "[2,3]"), "model.head_dim=2"], 295, "model.rope_scaling.long_factor=<value>",
     ["model.rope_scaling.long_factor=[2]"]),
    ([LONGROPE.replace("factor: 4, ", ""), "model.head_dim=2"], 295, "model.rope_scaling.factor=<longest",
     ["model.rope_scaling.factor=4"]),
    ([LONGROPE.replace("factor: 4", "short_mscale: 1"), "model.head_dim=2"], 295, "give both",
     ["model.rope_scaling.long_mscale=1.5"]),
    (["model.sliding_layers=[0]"], 288, "model.sliding_window=128", ["model.sliding_window=128"]),
    (["model.sliding_window=8", "model.sliding_layers=every_0"], 288, "model.sliding_layers=every_2_from_0",
     ["model.sliding_layers=every_2_from_0"]),
    (["model.sliding_window=8", "model.sliding_layers=[0,2]"], 288, "every_2_from_0",
     ["model.sliding_layers=null"]),
    (["model.sliding_window=8", "model.sliding_layers=[1,1]"], 288, "every_2_from_0",
     ["model.sliding_layers=[1]"]),
    (["model.sliding_window=8", "model.sliding_layers=every_5"], 288, "every_2_from_0",
     ["model.sliding_layers=null"]),
    (["model.attention=experts", "model.attention_sinks=true"], 282, "model.attention_sinks=false",
     ["model.attention_sinks=false"]),
    (["model.attention=experts", "model.rope_interleaved=true"], 297, "leave model.rope_interleaved out",
     ["model.rope_interleaved=false"]),
    (["model.attention=mla", "model.qk_rope_head_dim=3"], 299, "model.qk_rope_head_dim=4",
     ["model.qk_rope_head_dim=4"]),
    (["model.attention=mla", "model.partial_rotary_factor=0.5"], 300, "model.partial_rotary_factor=1",
     ["model.partial_rotary_factor=1"]),
    (["model.attention=mla", "model.sliding_window=8"], 300, "model.sliding_window=null",
     ["model.sliding_window=null"]),
    (["model.block=chain", "model.residual_multiplier=0.5"], 298, "model.residual_multiplier=1",
     ["model.residual_multiplier=1"]),
    (["model.mtp_layers=128"], 308, "model.mtp_layers=127", ["model.mtp_layers=127"]),
    (["model.mtp_layers=1", "language_loss=consistency"], 305, "language_loss=cross_entropy",
     ["language_loss=cross_entropy"]),
    (["model.mtp_layers=1", "router=dtop_p"], 307, "model.mtp_layers=0", ["router=top_p"]),
    (["model.first_dense_layers=3"], 26, "model.first_dense_layers=2", ["model.first_dense_layers=2"]),
    (["model.num_experts=[8]"], 27, "model.num_experts=[8,8]", ["model.num_experts=[8,8]"]),
    (["model.top_k=[0,2]", "model.first_dense_layers=1"], 103, "model.dense_dim=256",
     ["model.dense_dim=256"]),
    (["data.path="], 101, "data.path=<path>", ["data.path=x"]),
    (["data.cache=~nobody-of-that-name/x"], 102, "data.cache=./~nobody-of-that-name/x",
     ["data.cache=./~nobody-of-that-name/x"]),
    (["parallel=fssdp", "planner=eplb", "planner.groups=3", "parallel.rehome_interval=1"], 104,
     "planner.groups from 1, 2, 4, 8",
     ["planner.groups=4"]),
    (["model.num_experts=0"], 28, "model.num_experts=8", ["model.num_experts=8"]),
    (["model.num_experts=[0,8]", "model.moe_layers=[0,1]"], 28, "model.moe_layers", ["model.moe_layers=[1]"]),
    (["router=top_p", "router.k_max=9"], 254, "router.k_max=8", ["router.k_max=8"]),
    (["router=dtop_p", "router.target_k=9"], 255, "router.target_k=8", ["router.target_k=8"]),
    (["router=null_expert", "router.map_logits=true", "model.num_experts=[4,8]"], 256,
     "router.map_logits=false", ["router.map_logits=false"]),
    (["loss=[l1_lb]"], 257, "router=relu", ["router=relu"]),
    (["model.moe_layers=every_3"], 220, "model.moe_layers=every_2", ["model.moe_layers=every_2"]),
    (["model.moe_layers=[]"], 220, "model.first_dense_layers=2",
     ["model.moe_layers=null", "model.first_dense_layers=2"]),
    (["model.num_experts=[0,0]"], 220, "model.num_experts=8",
     ["model.moe_layers=every_2", "model.num_experts=8"]),
    (["model.moe_layers=[1,1]"], 220, "model.moe_layers=[1]", ["model.moe_layers=[1]"]),
    (["model.moe_layers=[0,2]"], 220, "model.moe_layers=[1]", ["model.moe_layers=[1]"]),
    (["model.moe_layers=2"], 220, "model.moe_layers=every_2", ["model.moe_layers=every_2"]),
    (["model.moe_layers=every_2", "model.first_dense_layers=1"], 221, "model.first_dense_layers=0",
     ["model.first_dense_layers=0"]),
    (["model.top_k=[0,2]", "model.moe_layers=every_2"], 103, "model.dense_dim=256", ["model.dense_dim=256"]),
    (["model.expert_dim=[8]"], 27, "model.expert_dim=[8,8]", ["model.expert_dim=[8,8]"]),
    (["run.packages=[tests]", "expert._target_=tests.support.expert_forms.TernaryExpert", "parallel=fssdp",
      "run.nproc=2", "optim=adamw", "parallel.calibrate=false", "parallel.max_sliced_experts=2"],
     215, "parallel.max_sliced_experts=0", ["parallel.max_sliced_experts=0"]),
    (["model.vocab_size=256"], 222, "model.vocab_size=257", ["model.vocab_size=257"]),
    (["data=synthetic", "data.vocab_size=300", "model.vocab_size=299"], 222, "or null",
     ["model.vocab_size=null"]),
    (["model.top_k=9"], 29, "model.top_k=8", ["model.top_k=8"]),
    (["model.top_k=[2,9]"], 29, "model.num_experts=9", ["model.num_experts=9"]),
    (["model.top_k=1"], 30, "router.weights=raw", ["router.weights=raw"]),
    (["model.top_k=1", "router=sigmoid"], 30, "router.weights=raw", ["router.weights=raw"]),
    (["model.top_k=1", "router.weights=softmax_of_topk"], 30, "router.weights=raw", ["router.weights=raw"]),
    (["run.nproc=2", "train.micro_batch=8"], 31, "parallel=ep", ["parallel=ep"]),
    (["parallel=ep", "parallel.ep=4", "run.nproc=2", "train.micro_batch=2"], 33, "from 1, 2; or run.nproc=4",
     ["parallel.ep=2"]),
    (["parallel=ep", "run.nproc=6", "train.global_batch=36", "train.micro_batch=6"], 34,
     "parallel.ep from 1, 2", ["parallel.ep=2"]),
    (["parallel=fsdp", "run.nproc=4", "parallel.shard=3"], 61, "from 1, 2, 4", ["parallel.shard=2"]),
    (["parallel=ep_fsdp", "run.nproc=6", "parallel.ep=2", "parallel.shard=3", "train.global_batch=12"], 61,
     "from 1, 2, 6",
     ["parallel.shard=6"]),
    (["optim=adamw", "parallel=fssdp", "parallel.max_sliced_experts=2", "parallel.rehome_interval=0"], 80,
     "parallel.rehome_interval=100", ["parallel.rehome_interval=100"]),
    (["parallel=fssdp", "parallel.max_sliced_experts=2", "optim=muon"], 81, "parallel.max_sliced_experts=0",
     ["parallel.max_sliced_experts=0"]),
    (["optim=adamw", "parallel=fssdp", "parallel.max_sliced_experts=2", "parallel.calibrate=true"], 82,
     "parallel.calibrate=false", ["parallel.calibrate=false"]),
    (["schedule=fixed", "schedule.chunks=1000000000"], 83, "schedule.chunks=2", ["schedule.chunks=2"]),
    (["parallel=fssdp", "run.nproc=4", "parallel.ep=3", "train.micro_batch=4"], 33, "from 1, 2, 4",
     ["parallel.ep=2"]),
    (["parallel=fssdp", "run.nproc=4", "parallel.shard=3", "train.micro_batch=4"], 61, "from 1, 2, 4",
     ["parallel.shard=2"]),
    (["parallel=fssdp", "run.nproc=2", "parallel.max_copies=9"], 70, "parallel.max_copies=8",
     ["parallel.max_copies=8"]),
    (["parallel=fssdp", "run.nproc=2", "parallel.max_copies=-1"], 20, "parallel.max_copies=2",
     ["parallel.max_copies=2"]),
    (["parallel=fssdp", "run.nproc=2", "parallel.max_copies=0"], 71, "parallel.max_copies=1, or planner=ep",
     ["parallel.max_copies=1"]),
    (["parallel=fssdp", "run.nproc=2", "parallel.max_copies=0", "planner=hecate"], 71, "planner=ep",
     ["planner=ep"]),
    (["parallel=fssdp", "run.nproc=2", "parallel.calibrate=true", "planner=ep"], 73, "planner=balanced",
     ["planner=balanced"]),
    (["data.encoding=base64"], 130, "data.encoding=utf-8, or cp1252, utf-16, shift_jis, gb18030 …",
     ["data.encoding=utf-8"]),
    (["data.separator=\t"], 131, "data.separator=null", ["data.separator=null"]),
    (["data.weights={code: 2, docs: -1}"], 170, "data.weights={code: 2,docs: 1}",
     ["data.weights={code: 2,docs: 1}"]),
    (["denoising.rates={r3_15x: 1}"], 283, "denoising.rates={r3_15: 1}", ["denoising.rates={r3_15: 1}"]),
    (["denoising.rates={s_25: 0}"], 284, "denoising.rates={s_25: 1}", ["denoising.rates={s_25: 1}"]),
    (["denoising.rates={r3_15: 1}", "train.seq_len=4"], 285, "train.seq_len=16", ["train.seq_len=16"]),
    (["denoising=ul2", "data.mask_documents=true"], 286, "data.mask_documents=false", ["denoising=none"]),
    (["schedule=fixed", "schedule.kind=none"], 85, "schedule=fixed schedule.chunks=2",
     ["schedule.kind=fixed"]),
    (["schedule=fixed", "schedule.chunks=1"], 85, "schedule=none schedule.chunks=1", ["schedule=none"]),
    (["schedule=fixed", "schedule.chunks=0"], 20, "schedule.chunks=1", ["schedule.chunks=2"]),
    (["balance.weight=-1"], 64, "balance.weight=0.01", ["balance.weight=0.5"]),
    (["loss=[micro_balance]", "loss.micro_balance.scope=global", "loss.micro_balance.mode=sync"], 75,
     "scope=micro",
     ["loss.micro_balance.scope=micro", "~loss.micro_balance.mode"]),
    (["balance=node", "balance.mode=warm"], 76, "balance.mode=buffer", ["balance.mode=buffer"]),
    (["train.micro_batch=5"], 35, "from 1, 2, 4, 8, 16", ["train.micro_batch=4"]),
    (["parallel=ddp", "run.nproc=3"], 35, "train.global_batch=18", ["train.global_batch=18"]),
    (["data=tokens"], 36, "data.path", ["data.path=x"]),
    (["data=megatron"], 36, "data.path", ["data.path=x"]),
    (["engine=deepspeed", "optim=adamw"], 67, "parallel=ep run.nproc=2", ["parallel=ep", "run.nproc=2"]),
    (["engine=deepspeed", "optim=adamw", "parallel=ddp"], 67, "run.nproc=2", ["run.nproc=2"]),
    (["engine=deepspeed", "optim=adamw", "parallel=ep", "run.nproc=2", "run.dtype=float64"], 68,
     "run.dtype=float32", ["run.dtype=float32"]),
    (["engine=deepspeed", "parallel=ep", "run.nproc=2", "optim=muon"], 68, "optim=adamw", ["optim=adamw"]),
    (["router=topk", "loss=[z,load]"], 250, "router=topk router.noise=vmoe", ["router.noise=vmoe"]),
    (["router=sigmoid", "loss=[z,load]"], 250, "loss=[importance]", ["loss=[z,importance]"]),
    (["router.noise=normal", "router.num_groups=4", "router.topk_groups=2", "loss=[z,load]"], 250,
     "router.num_groups=1", ["loss=[z,importance]"]),
    (["router.noise=gumbel", "router.second_expert=random"], 251, "router.second_expert=sample",
     ["router.second_expert=sample"]),
    (["router.balance=quantile", "router.second_expert=sample"], 253, "router.second_expert=top",
     ["router.balance=none"]),
    (["router=sparsemixer", "model.attention=experts", "model.num_kv_heads=1", "model.num_heads=4"], 252,
     "model.attention=plain", ["model.attention=plain"]),
    (["router=sparsemixer", "model.top_k=3"], 252, "model.top_k=2", ["model.top_k=2"]),
    (["router.second_expert=random", "model.top_k=[2,3]"], 252, "model.top_k=2, or router.second_expert=top",
     ["router.second_expert=top"]),
    (["router=expert_choice", "router.capacity=9", "eval.allow_noncausal=true"], 259, "router.capacity=8",
     ["router.capacity=8"]),
    (["router=fixed_random", "router.k_min=4"], 260, "router.k_min=2", ["router.k_min=2"]),
    (["router=fixed_random", "router.k_min=2", "model.attention=experts", "model.num_kv_heads=4"], 260,
     "router.k_min=1", ["router.k_min=1"]),
    (["router=expert_choice", "router.capacity=6", "eval.allow_noncausal=true", "model.attention=experts",
      "model.num_attention_experts=4"], 259, "router.capacity=4", ["router.capacity=4"]),
    (["router=top_p", "router.k_max=6", "model.attention=experts", "model.num_attention_experts=4"], 254,
     "router.k_max=4", ["router.k_max=4"]),
    (["router=domain", "router.experts=[[0,1,2],[4,5,6]]", "model.attention=experts",
      "model.num_attention_experts=6"], 261, "[0,1,2]", ["router.experts=[[0,1,2],[3,4,5]]"]),
    (["router=null_expert", "router.num_constant=2", "model.block=latent"], 301, "router.num_constant=0",
     ["model.latent_dim=128"]),
    (["router=domain", "router.experts=[[0,1],[1,8]]"], 261, "[0,1]", ["router.experts=[[0,1],[0,1]]"]),
    (["router=domain", "router.experts=[[0,1],[2,2]]"], 261, "[0,1]", ["router.experts=[[0,1],[0,1]]"]),
    (["router.num_groups=3"], 63, "router.num_groups=1 router.topk_groups=1", ["router.num_groups=1"]),
    (["router.num_groups=8"], 63, "router.num_groups=8 router.topk_groups=2", ["router.topk_groups=2"]),
    (["router=sigmoid", "router.num_groups=4", "router.topk_groups=5"], 63, "router.topk_groups=1",
     ["router.topk_groups=1"]),
    (["model.num_experts=[8,6]", "router.num_groups=4", "router.topk_groups=2"], 63,
     "router.num_groups=2 router.topk_groups=2",
     ["router.num_groups=2"]),
    (["router=sigmoid", "router.balance=quantile", "router.num_groups=4", "router.topk_groups=2"], 267,
     "router.topk_groups=4", ["router.topk_groups=4"]),
    (["router.num_groups=0"], 64, "router.num_groups=1", ["router.num_groups=1"]),
    (["optim.schedule=wsd", "optim.decay=1.5"], 20, "optim.decay=0.5", ["optim.decay=0.1"]),
    (["optim=muon", "optim.muon_momentum=1"], 20, "optim.muon_momentum=0.95", ["optim.muon_momentum=0.95"]),
    (["optim=muon", "optim.muon_ns_steps=100"], 20, "optim.muon_ns_steps=5", ["optim.muon_ns_steps=5"]),
    (["router.scale=0"], 64, "router.scale=1", ["router.scale=2.5"]),
    (["router=sigmoid", "router.update_rate=-1e-3"], 64, "router.update_rate=0.001",
     ["router.update_rate=0"]),
    (["capacity=prob", "capacity.factor=0"], 64, "capacity.factor=1.25", ["capacity.factor=1"]),
    (["capacity=position", "capacity.eval_factor=inf"], 64, "capacity.eval_factor=2",
     ["capacity.eval_factor=1"]),
    (["capacity=position", "capacity.min_capacity=-1"], 64, "capacity.min_capacity=4",
     ["capacity.min_capacity=0"]),
    *[([f"loss.{name}._target_=moetrain.losses.z.ZLoss"], 160,
       f"loss.my_{name}._target_=moetrain.losses.z.ZLoss",
       [f"~loss.{name}", f"loss.my_{name}._target_=moetrain.losses.z.ZLoss"])
      for name in ("ce", "total", "balance", "weighted")],
    (["model.attention=experts", "model.num_attention_experts=1"], 282, "model.num_attention_experts=2",
     ["model.num_attention_experts=2"]),
    (["model.attention=sliced"], 282, "model.num_kv_heads=4", ["model.num_kv_heads=4"]),
    (["loss=[device_balance]", "loss.device_balance.num_groups=3", "model.num_experts=[8,12]"], 270,
     "loss.device_balance.num_groups=2", ["loss.device_balance.num_groups=4"]),
    (["optim.betas=[0.9]"], 37, "optim.betas=[0.9,0.95]", ["optim.betas=[0.9,0.95]"]),
]


@pytest.mark.parametrize("overrides, number, advice, repair", BROKEN)
def test_a_rule_refuses_and_its_advice_works(overrides: list[str], number: int, advice: str,
                                             repair: list[str]) -> None:
    with pytest.raises(ConfigErrors) as caught:
        compose(overrides)
    error, *rest = caught.value.errors
    assert error.id == f"E-CONFIG-{number:03d}" and not rest
    assert advice in error.next
    compose([*overrides, *repair])


def test_every_rule_is_raised_above() -> None:
    modules = [importlib.import_module(f"{rules.__name__}.{found.name}")
               for found in pkgutil.iter_modules(rules.__path__)]
    written = {int(number) for module in modules
               for number in re.findall(r"(?:ConfigError|_outside)\(\s*(\d+)", inspect.getsource(module))}
    assert {number for _, number, _, _ in BROKEN} == written
    defined = {rule for module in modules
               for rule in vars(module).values() if inspect.isgeneratorfunction(rule)}
    assert set(checks.RULES) == defined and len(checks.RULES) == len(defined)


def test_expert_parallelism_lists_the_degrees_that_work() -> None:
    with pytest.raises(ConfigErrors) as caught:
        compose(["parallel=ep", "parallel.ep=8", "run.nproc=8", "model.num_experts=60",
                 "train.micro_batch=2"])
    assert caught.value.errors[0].what == "parallel.ep=8 does not divide model.num_experts=60"
    assert caught.value.errors[0].next == "choose parallel.ep from 1, 2, 4"


def test_parallel_modes_work_in_one_process() -> None:
    for mode in ("ddp", "ep"):
        assert compose([f"parallel={mode}"]).run.nproc == 1


def test_leading_dense_layers_need_no_experts() -> None:
    config = compose(["model.first_dense_layers=1", "model.num_experts=[0,6]", "model.top_k=[0,2]",
                      "model.dense_dim=64"])
    assert moe_layers(config) == [(1, 6, 2)]


def test_torchrun_says_how_many_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([])
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert checks.world_size(config) == 1        # left over in the shell
    monkeypatch.setenv("RANK", "0")
    assert checks.world_size(config) == 4
    with pytest.raises(ConfigErrors):
        compose([])

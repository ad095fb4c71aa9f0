"""Table of the options that read each key, and the check of a command line against it.

A key on the command line that the chosen options do not read is an error, because its writer expects an
effect. What an experiment or the yaml file of an option sets may have no effect: nobody typed it for this
command. A typed value also passes where it changes nothing (`parallel.ep=null`) or states what holds anyway
(NEUTRAL: `parallel.ep=1`).

Arguments of a part are read by the class that accepts them; the table lists what else they need.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from moetrain.config.groups import default_options
from moetrain.config.overrides import DELETE, Command
from moetrain.config.values import show

# The key whose value is the name of the chosen option of a group.
KIND = {"parallel": "parallel.mode", "schedule": "schedule.kind", "engine": "engine.name",
        "data": "data.kind", "optim": "optim.name", "balance": "balance.scope"}

_FSSDP = "parallel=fssdp"
_EXPERT_PARALLEL, _SHARDED = "parallel=ep|ep_fsdp|fssdp", "parallel=fsdp|ep_fsdp|fssdp"
_MUON, _POOLED = "optim=muon", "balance=global|node"

# Key or group -> the conditions under which it is read, all of them: `group=option|option`,
# `key=value|value`, `key!=value`, `key>number` or `key has entry`. Alternatives joined by `or` are one
# condition; the first of them is advised. A star stands for the same name on both sides.
READ_WITH: dict[str, tuple[str, ...]] = {
    "model.dense_dim": ("model.first_dense_layers>0 or model.moe_layers!=null or model.num_experts has 0",),
    "model.shared_dim": ("model.num_shared_experts>0",),
    "model.shared_gate": ("model.num_shared_experts>0",),
    "model.residual_mixing": ("model.block=residual",),
    "model.latent_dim": ("model.block=latent",),
    "model.num_attention_experts": ("model.attention=experts",),
    "model.top_k_heads": ("model.attention=sliced",),
    **dict.fromkeys((f"model.{name}" for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
                                                  "qk_rope_head_dim", "v_head_dim")),
                    ("model.attention=mla",)),
    "model.chain_rounds": ("model.block=chain",),
    "model.chain_residual": ("model.block=chain",),
    "model.chain_share_router": ("model.block=chain",),
    "init.digest": ("init.from!=null",),
    "router.topk_groups": ("router.num_groups>1",),
    "router.group_score": ("router.num_groups>1",),
    "router.jitter_scope": ("router.jitter_eps>0",),
    "router.quantile_rate": ("router.balance=quantile",),
    "router.update_rate": ("router.balance=sign",),
    "router.counts": ("router.balance=sign", "router.update_rate>0"),
    "router.center": ("router.update_rate>0 or router.balance=quantile",),
    "router.counts_path": ("router.table=balanced",),
    "router.hidden": ("router.kind=mlp|gmm",),
    "router.dropout": ("router.kind=mlp",),
    "parallel.ep": (_EXPERT_PARALLEL,),
    "parallel.shard": (_SHARDED,),
    "parallel.exchange": (_EXPERT_PARALLEL,),
    "parallel.exact_combine": (_EXPERT_PARALLEL,),
    "parallel.max_copies": (_FSSDP,),
    "parallel.rematerialize": (_FSSDP,),
    "parallel.collective": (_FSSDP,),
    "parallel.forecast": (_FSSDP,),
    "parallel.window": (_FSSDP, "parallel.forecast=mean"),
    "parallel.max_forecast_error": (_FSSDP,),
    "parallel.calibrate": (_FSSDP,),
    "parallel.rehome_interval": (_FSSDP,),
    "parallel.max_sliced_experts": (_FSSDP,),
    "planner": (_FSSDP,),
    "planner.horizon": (_FSSDP, "parallel.rehome_interval>0"),
    "planner.state_ratio": (_FSSDP, "parallel.rehome_interval>0"),
    "planner.*": (_FSSDP,),
    "hardware": (_FSSDP,),
    "hardware.flops": (_FSSDP,),
    "hardware.inside": (_FSSDP,),
    "hardware.between": (_FSSDP,),
    "hardware.latency_s": (_FSSDP,),
    "schedule.chunks": ("schedule=fixed",),
    "engine.zero_stage": ("engine=deepspeed",),
    "balance._target_": (),
    "balance.scope": (),
    "balance.mode": (_POOLED,),
    "balance.drift": (_POOLED, "balance.mode=warm"),
    "balance.*": ("balance=global|node|micro|sequence",),
    "loss.*.mode": ("loss.*.scope=global|node",),
    "loss.*.drift": ("loss.*.scope=global|node", "loss.*.mode=warm"),
    "data.path": ("data=text|tokens|megatron|memmap",),
    "data.cache": ("data=text|megatron|memmap",),
    "data.tokenizer": ("data=text|megatron|memmap",),
    "data.parse_special": ("data=text",),
    "data.mixture": ("data=text|tokens|megatron|memmap",),
    "data.weights": ("data=text|tokens|megatron|memmap",),
    "data.domain_cap": ("data=text",),
    "data.held_out": ("data=text|megatron|memmap",),
    "data.held_out_share": ("data=text|megatron|memmap", "data.held_out=null"),
    **dict.fromkeys((f"data.{name}" for name in ("text_key", "domain_key", "separator", "encoding")),
                    ("data=text",)),
    "data.split": ("data=text|megatron|memmap",),
    "data.allow_left_out": ("data=text",),
    "data.overlap": ("data=text",),
    "data.vocab_size": ("data=synthetic|megatron|memmap",),
    "data.dtype": ("data=memmap",),
    "data.end_token": ("data=text|megatron|memmap",),
    "data.num_domains": ("data=synthetic",),
    "data.min_length": ("data=synthetic",),
    "optim.muon_lr": (_MUON,),
    "optim.muon_momentum": (_MUON,),
    "optim.muon_adjust": (_MUON,),
    "optim.muon_ns_steps": (_MUON,),
    "optim.muon_precision": (_MUON,),
    "optim.decay": ("optim.schedule=wsd",),
    "optim.decay_shape": ("optim.schedule=wsd",),
    "log.timeline_start": ("log.timeline>0",),
    "model.mtp_weight": ("model.mtp_layers>0",),
    **dict.fromkeys((f"log.wandb_{name}" for name in ("project", "entity", "name", "group", "tags", "notes")),
                    ("log.wandb=auto|offline|online",)),
}

# Keys of the schema that are read whatever is chosen, or recorded for a later command, as generate.* is.
ALWAYS = frozenset("""
    run.name run.dir run.nproc run.steps run.stop_at run.seed run.device run.share_gpu run.dtype run.timeout_s
    run.max_restarts run.grace_s run.packages
    model.dim model.num_layers model.num_heads model.num_kv_heads model.head_dim model.qk_norm model.attention
    model.clip_qkv model.attention_bias model.attention_sinks model.sliding_window model.sliding_layers
    model.attention_multiplier
    model.rope_theta model.partial_rotary_factor model.rope_interleaved model.rope_scaling model.norm
    model.head_bias model.embedding_multiplier model.residual_multiplier model.logits_scaling
    model.mtp_layers
    model.norm_eps model.tie_embeddings model.num_experts model.top_k model.expert_dim
    model.num_shared_experts model.moe_layers model.first_dense_layers model.vocab_size model.block
    model.init_std
    init.from
    parallel.mode schedule.kind engine.name
    train.global_batch train.micro_batch train.seq_len train.clip train.activation_checkpointing train.frozen
    train.count_pass train.head_chunk train.aux_loss
    data.kind data.seed data.mask_documents denoising.rates
    optim.name optim.lr optim.betas optim.eps optim.weight_decay optim.router_lr_scale optim.expert_lr_scale
    optim.schedule optim.warmup optim.min_lr_ratio
    eval.interval eval.windows eval.batch eval.ngram eval.allow_noncausal
    checkpoint.interval checkpoint.every_minutes checkpoint.keep checkpoint.async_save checkpoint.verify
    checkpoint.max_failed_saves
    log.interval log.heatmap_every log.progress log.sources log.router_dump log.routing log.timeline log.wandb
    generate.prompt generate.tokens generate.temperature generate.top_p generate.seed generate.cache
""".split())

# Values that describe an option that does not read the key: no split, no copies, no moves, no weight.
NEUTRAL = {"parallel.ep": 1, "parallel.shard": 1, "parallel.max_copies": 0, "parallel.rehome_interval": 0,
           "planner": "ep", "router.topk_groups": 1, "balance.weight": 0}


class Unread(NamedTuple):
    """An override without effect."""

    key: str                      # or a group
    text: str                     # as typed
    unmet: tuple[str, ...]        # conditions of READ_WITH that do not hold, stars filled in


def unread(command: Command, before: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Unread]:
    """Find overrides that nothing reads.

    Args:
        command: the command line.
        before: every leaf by path, as the files have it.
        values: every leaf by path, with the command line on top.
    """
    defaults = default_options()
    for group, option in command.choices.items():
        if option not in (defaults.get(group), NEUTRAL.get(group)) and (missing := unmet(group, values)):
            yield Unread(group, f"{group}={show(option)}", missing)
    for key, given in command.values.items():
        harmless = given.value is DELETE or _at(key, values) in (_at(key, before), NEUTRAL.get(key))
        if not harmless and (missing := unmet(key, values)):
            yield Unread(key, given.text, missing)


def _at(key: str, values: Mapping[str, Any]) -> Any:
    """Look up the value of a key; of a key that holds a mapping, the values by path."""
    return values.get(key, {path: value for path, value in values.items() if path.startswith(f"{key}.")})


def conditions(key: str) -> tuple[str, ...]:
    """List the conditions under which a key is read: the first entry of the table that matches."""
    for pattern, needed in READ_WITH.items():
        if fnmatchcase(key, pattern):
            return tuple(condition.replace("loss.*", ".".join(key.split(".")[:2])) for condition in needed)
    return ()


def unmet(key: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """List the conditions of a key that do not hold."""
    return tuple(condition for condition in conditions(key) if not holds(condition, values))


def holds(condition: str, values: Mapping[str, Any]) -> bool:
    """Check a condition. It holds where no chosen option has the key that it asks for."""
    return any(_holds(alternative, values) for alternative in condition.split(" or "))


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    _, sign, wanted = parts(condition)
    key = key_of(condition)
    if key not in values:
        return True
    match sign:
        case ">":
            return values[key] > float(wanted)
        case " has ":
            return isinstance(values[key], list) and wanted in map(show, values[key])
        case "!=":
            return show(values[key]) != wanted
    return show(values[key]) in wanted.split("|")


def to_type(condition: str) -> str:
    """Give an override that meets the condition, with the first of its alternatives and values."""
    name, sign, wanted = parts(condition)
    if sign == "!=":
        return f"{name}=<value>"
    return f"{name}={wanted.partition('|')[0]}" if sign == "=" else f"{name}={int(wanted) + 1}"


def key_of(condition: str) -> str:
    """Return the key whose value decides the condition; that of the first alternative."""
    name, _, _ = parts(condition)
    return KIND.get(name, name)


def in_words(condition: str) -> str:
    """Word a condition for a message: `data=text, data=tokens or data=megatron`."""
    return " or ".join(map(_in_words, condition.split(" or ")))


def _in_words(condition: str) -> str:
    name, sign, wanted = parts(condition)
    match sign:
        case ">":
            return f"{name} above {wanted}"
        case " has ":
            return f"an entry {wanted} in {name}"
        case "!=":
            return f"{name} not {wanted}"
    *most, last = [f"{name}={value}" for value in wanted.split("|")]
    return f"{', '.join(most)} or {last}" if most else last


def parts(condition: str) -> tuple[str, str, str]:
    """Split the first alternative of a condition into key or group, sign and value."""
    first = condition.partition(" or ")[0]
    return first.partition(next(sign for sign in (" has ", "!=", ">", "=") if sign in first))

"""The typed config of a run: every key that a user may set, with its type, its default and one line of help.

`conf/` holds the same keys as yaml, in Hydra groups. `config/compose.py` turns yaml and command line into a
`Config` and refuses what does not fit. Parts that are chosen by class (`router`, `expert`, `capacity`,
`balance`, `planner`, `loss.<name>`) are mappings with a `_target_`; `config/build.py` makes the object.

No torch here: `moetrain --help` and every configuration error come before torch is imported.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from moetrain.config.key import key
from moetrain.config.parallel_schema import EngineConfig, HardwareConfig, ParallelConfig, ScheduleConfig

# Experts of runs whose config says nothing of them.
SWIGLU = {"_target_": "moetrain.moe.expert_form.SwigluExpert"}
TOPK = {"_target_": "moetrain.routers.topk.TopKRouter"}
CROSS_ENTROPY = {"_target_": "moetrain.losses.language.CrossEntropy"}


@dataclass(frozen=True)
class RunConfig:
    """Name, length, devices and limits of the run."""

    name: str = key("default", "name of the run; its directory is runs/<name>")
    dir: str | None = key(None, "directory of the run, instead of runs/<name>", path=True)
    packages: list[str] = key(
        [],
        "packages of your own that may hold routers, forms of experts, losses, capacity policies and "
        "planners; typed or set in code, never read from a file")
    nproc: int = key(1, "local ranks to start; ignored under torchrun")
    steps: int = key(800, "optimizer steps: the length of the schedule")
    stop_at: int | None = key(None, "stop cleanly with a save after this step")
    seed: int = key(0, "seed of initialisation and routing, and of the data where data.seed is null")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto takes CUDA when there is one")
    share_gpu: bool = key(
        False,
        "ranks of a machine may share its GPUs, in turn; all that is collective goes over gloo: to check a "
        "setup on fewer GPUs than it is for, not to train (unverified)")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = key(
        "auto",
        "dtype of the computation; parameters stay float32 or better. auto: that of the run that goes on, "
        "bfloat16 on GPUs that compute it, else float32")
    timeout_s: int = key(300, "seconds a collective may wait for a missing rank")
    max_restarts: int = key(
        3, "how often run.nproc ranks are started again, all of them, after one of them was lost")
    grace_s: float | None = key(
        None, "seconds after a signal to stop until the run leaves without its save; null: no limit")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer."""

    dim: int = key(128, "width D")
    num_layers: int = key(2, "transformer blocks")
    num_heads: int = key(4, "attention heads")
    num_kv_heads: int = key(2, "key-value heads; divides num_heads")
    head_dim: int | None = key(None, "width of a head; dim / num_heads when null")
    attention: Literal["plain", "mla", "experts", "sliced"] = key(
        "plain",
        "mla: multi-head latent attention, keys and values of all heads made of one short vector (DeepSeek); "
        "experts: attention experts with stick-breaking weights (ModuleFormer), each with num_kv_heads heads "
        "and queries and outputs of its own; keys and values are shared, and a token takes num_heads / "
        "num_kv_heads of them; sliced: a token takes some of the heads (Union-of-Experts)")
    num_attention_experts: int = key(8, "attention experts a layer")
    q_lora_rank: int | None = key(
        None, "attention mla: width of the latent of queries; they are made of the token itself when null")
    kv_lora_rank: int = key(512, "attention mla: width of the latent of keys and values")
    qk_nope_head_dim: int = key(128, "attention mla: channels of a query and a key without positions")
    qk_rope_head_dim: int = key(64, "attention mla: channels that the rotary embedding turns")
    v_head_dim: int = key(128, "attention mla: channels of a value")
    top_k_heads: int | None = key(None, "attention sliced: heads of a token; half of them when null")
    qk_norm: Literal["none", "head", "all"] = key(
        "none", "RMSNorm on queries and keys: of each head (Qwen3), or of all heads together (OLMoE)")
    clip_qkv: float | None = key(
        None, "largest absolute value of queries, keys and values; they are not clipped when null (OLMoE)")
    attention_bias: Literal["none", "qkv", "all"] = key(
        "none", "biases of the projections to queries, keys and values (Qwen2), or of all of attention")
    attention_sinks: bool = key(
        False, "a learned logit of each head in the softmax of attention, whose share is dropped (GPT-OSS)")
    sliding_window: int | None = key(
        None, "keys that a query attends to at most, its own included; all before it when null")
    sliding_layers: str | list[int] | None = key(
        None, "layers whose attention has the window, written as in moe_layers; all of them when null")
    attention_multiplier: float | None = key(
        None, "factor of the products of queries and keys; 1 / sqrt of a head's width when null (Granite)")
    rope_theta: float = key(10000.0, "base of the rotary embedding")
    partial_rotary_factor: float = key(
        1.0, "share of a head's channels, its first ones, that the rotary embedding turns")
    rope_interleaved: bool = key(
        False, "pairs of the rotary embedding are neighboring channels (DeepSeek), not those of two halves")
    rope_scaling: dict[str, bool | int | float | str | list[float] | None] = key(
        {},
        "change of the rotary frequencies for longer texts: `type` linear, llama3, yarn or longrope, and its "
        "arguments under the names of Hugging Face: {type: linear, factor: 4}; none: the plain ones")
    norm: Literal["rms", "layer"] = key(
        "rms", "norms of blocks and of the head's input; layer: LayerNorm with a bias")
    norm_eps: float = key(1e-6, "epsilon of the norms")
    tie_embeddings: bool = key(False, "the head is the embedding")
    head_bias: bool = key(False, "a bias of the logits")
    embedding_multiplier: float = key(1.0, "factor of the embedding (Granite)")
    residual_multiplier: float = key(
        1.0, "factor of what attention and feed-forward networks add to the residual stream (Granite)")
    logits_scaling: float = key(1.0, "divides the logits (Granite)")
    num_experts: int | list[int] = key(8, "routed experts a layer, or one entry a layer, 0 in a dense one")
    top_k: int | list[int] = key(2, "experts a token, or one entry a layer")
    expert_dim: int | list[int] = key(128, "hidden width F of an expert, or one entry a layer")
    num_shared_experts: int = key(0, "experts that every token visits")
    shared_dim: int | None = key(
        None, "hidden width of all shared experts together; num_shared_experts * expert_dim when null")
    shared_gate: bool = key(
        False, "a token multiplies the shared experts' output by a sigmoid of its own (Qwen1.5-MoE, Qwen2)")
    moe_layers: str | list[int] | None = key(
        None, "layers with experts, numbered from 0: a list, every_4 (3, 7, 11, ...) or every_4_from_0 (0, "
        "4, 8, ...); the others are dense; null: all but model.first_dense_layers")
    first_dense_layers: int = key(0, "leading layers with a dense feed-forward network instead of experts")
    dense_dim: int | None = key(None, "hidden width of a dense layer; top_k * expert_dim when null")
    block: Literal["plain", "residual", "chain", "latent", "sliced"] = key(
        "plain",
        "architecture of layers with experts; residual: a dense network of an expert's shape beside them "
        "(DeepSpeed-MoE, OpenMoE); chain: several rounds through the same experts (Chain-of-Experts); "
        "latent: experts in a narrower space (LatentMoE); sliced: experts that are slices of one dense "
        "network (Union-of-Experts)")
    residual_mixing: Literal["sum", "learned"] = key(
        "learned",
        "block residual: experts and dense network are added, or mixed by a learned softmax of two")
    chain_rounds: int = key(2, "block chain: rounds of a layer, each with model.top_k experts a token")
    chain_residual: Literal["stream", "paper_literal", "inner", "outer"] = key(
        "stream",
        "block chain: where the residual is added; stream: in each round, around norm and experts; behind "
        "one norm, paper_literal: in each round and around all, inner: in each round (the authors' code), "
        "outer: around all")
    chain_share_router: bool = key(False, "block chain: one router decides in all rounds of a layer")
    latent_dim: int | None = key(None, "block latent: width of the space of the experts; dim / 4 when null")
    mtp_layers: int = key(
        0, "multi-token prediction (DeepSeek-V3): further blocks, each of which predicts one token further "
        "ahead; in training alone")
    mtp_weight: float = key(0.3, "weight of the mean of their cross-entropies beside the model's own")
    vocab_size: int | None = key(
        None, "rows of embedding and head; more than the tokenizer has ids are padding; its ids when null")
    init_std: float = key(0.05, "standard deviation of the initial weights")


@dataclass(frozen=True)
class InitConfig:
    """Weights that a new run begins from. The field `from_` is the key `from` (values.key_name)."""

    from_: str | None = key(
        None,
        "newest checkpoint of a run (its name or directory), or folder of a checkpoint: its weights, with a "
        "new optimizer, step and order of data; not read again by a run that has a checkpoint", path=True)
    digest: str | None = key(None, "of those weights; null: the run records it; another is refused")


@dataclass(frozen=True)
class TrainConfig:
    """Batch, sequence length and memory of a training step."""

    global_batch: int = key(16, "sequences of one optimizer step, over all ranks")
    micro_batch: int | None = key(
        None, "sequences of one forward pass on one rank; global_batch / ranks when null")
    seq_len: int = key(128, "tokens of a sequence")
    clip: float = key(1.0, "largest global gradient norm; 0 does not clip")
    activation_checkpointing: Literal["none", "selective", "full"] = key(
        "none", "what backward computes again: nothing, cheap operations, or whole blocks; routing never")
    count_pass: bool | None = key(
        None, "exact balance under accumulation by a forward pass that only counts, instead of keeping the "
        "graphs of all micro-batches; where these would not fit when null")
    head_chunk: int = key(
        0, "tokens whose logits are in memory at once, made again in backward (0: all of a micro-batch)")
    frozen: list[str] = key(
        [],
        "parameters that stay as they are, by patterns of their names in a checkpoint: embed, layers.0.*, "
        "*.moe.experts.*")
    aux_loss: Literal["added", "injected"] = key(
        "added",
        "how auxiliary losses reach backward: added to the loss, or their slopes injected before the head")

    def per_forward(self, ranks: int) -> int:
        """Sequences of one forward pass on one of `ranks` ranks."""
        return self.micro_batch or self.global_batch // ranks


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from, and how text becomes tokens."""

    kind: Literal["text", "tokens", "megatron", "memmap", "synthetic"] = key(
        "text", "text files, prepared token shards, Megatron-Core's indexed datasets, token files of other "
        "trainers, or generated tokens")
    path: str | None = key(
        None,
        "file or folder; null: the built-in corpus; megatron: prefixes, with weights or without", path=True)
    cache: str | None = key(
        None, "where prepared tokens go, and indexes of token files; <run.dir>/data when null", path=True)
    tokenizer: str = key(
        "bytes", "bytes, or the path of a tokenizer.json or of a folder that holds one; megatron and "
        "memmap also: none", path=True)
    end_token: str | None = key(
        None,
        "the token that ends a document: its text in a tokenizer.json, an id of megatron and memmap, or "
        "`new` for one more id; null: as the files of the tokenizer, or indexed data, have it")
    parse_special: bool = key(
        False, "special strings inside a text, such as </s>, are the special tokens of that name")
    mixture: Literal["proportional", "uniform"] = key("proportional", "domains by their size, or each alike")
    weights: dict[str, float] = key(
        {},
        "how many times as often as the mixture alone has it a domain comes, 1 unless given: "
        "data.weights={python: 2, docs: 0.5}; 0 leaves it out of training")
    seed: int | None = key(None, "seed of generated tokens, and of the order of samples; run.seed when null")
    mask_documents: bool = key(False, "attention stays inside a document")
    domain_cap: int | None = key(None, "bytes of text to take from a domain at most")
    held_out: str | None = key(
        None, "file or folder of held-out text of your own, of which nothing is trained on; null: a "
        "share of data.path", path=True)
    held_out_share: float = key(
        0.05,
        "share of the text to hold out, where data.held_out names none and no validation split is there")
    split: Literal["respect", "merge"] = key(
        "respect",
        "train, valid and test that lie side by side in data.path: valid is held out and test left alone, "
        "or all of them are one text")
    allow_left_out: float = key(
        0.1, "share of the bytes of data.path that may be left out because they are not text; above it "
        "preparing is refused")
    text_key: str | None = key(
        "text",
        "the text in a record (JSON lines, JSON, CSV, TSV, Parquet): a key, meta.body for one in another; "
        "null: everything is text as it stands")
    domain_key: str | None = key("domain", "the domain in a record, likewise; null: records have none")
    separator: str | None = key(None, "a line that ends a document inside a text, such as <|endoftext|>")
    encoding: str = key("utf-8", "of texts without a byte order mark: any name that Python knows")
    overlap: int = key(
        1_000_000,
        "places of held-out text that are looked up in the training text at most, to say how much of it "
        "also occurs there; more are estimated from so many (0: not measured)")
    vocab_size: int = key(
        256, "synthetic, and megatron and memmap without a tokenizer: tokens of the vocabulary")
    dtype: Literal["auto", "uint16", "uint32"] = key(
        "auto", "memmap: type of ids in files without a header; auto: what the vocabulary allows")
    num_domains: int = key(4, "synthetic: number of domains")
    min_length: float = key(1.0, "synthetic: shortest sequence as a share of seq_len; the rest is padding")


@dataclass(frozen=True)
class DenoisingConfig:
    """UL2's mixture of denoisers, by which training windows are corrupted."""

    rates: dict[str, float] = key(
        {},
        "share of the windows that each denoiser corrupts, in any scale, by its name <mode><mean "
        "span>_<percent>: {r3_15: 1, x64_50: 1, s_25: 2}; none: a token is predicted from those before it")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    name: Literal["adamw", "muon"] = key(
        "muon", "muon: Muon for the matrices of hidden layers, AdamW for the rest")
    lr: float = key(3e-3, "peak learning rate of AdamW")
    betas: list[float] = key([0.9, 0.95], "AdamW's moment decays")
    eps: float = key(1e-8, "AdamW's epsilon")
    weight_decay: float = key(0.1, "decay of matrices; norms, embeddings and routers are not decayed")
    router_lr_scale: float = key(1.0, "learning rate of routers over optim.lr")
    expert_lr_scale: float = key(1.0, "learning rate of experts over optim.lr")
    muon_lr: float | None = key(6e-3, "muon: peak learning rate of hidden matrices; optim.lr when null")
    muon_momentum: float = key(0.95, "muon: decay of the momentum (Nesterov)")
    muon_adjust: Literal["match_rms_adamw", "original"] = key(
        "match_rms_adamw",
        "muon: factor on muon_lr for an A x B matrix: 0.2 sqrt(max(A, B)), or sqrt(max(1, A / B))")
    muon_ns_steps: int = key(5, "muon: Newton-Schulz iterations")
    muon_precision: Literal["full", "bfloat16"] = key(
        "full",
        "muon: full iterates in the precision of the parameters; bfloat16 is faster and rounds otherwise "
        "on another mesh")
    schedule: Literal["cosine", "wsd"] = key("wsd", "wsd: warm-up, stable, decay over the last steps")
    warmup: int = key(50, "steps of linear warm-up")
    decay: float = key(0.5, "wsd: share of the steps over which the rate decays")
    decay_shape: Literal["linear", "sqrt"] = key("linear", "wsd: along a line, or as 1 - sqrt(progress)")
    min_lr_ratio: float = key(0.0, "learning rate at the end of the schedule over its peak")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text."""

    interval: int = key(0, "evaluate every so many steps (0: only at the end)")
    windows: int = key(32, "held-out windows of seq_len tokens per domain that is named in an evaluation")
    batch: int = key(16, "windows of one forward pass")
    allow_noncausal: bool = key(
        False, "evaluate and generate with routers whose choices for a token depend on later tokens")
    ngram: int = key(
        -1, "print n-gram models up to this order beside the result of `moetrain eval` (-1: none)")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many checkpoints to keep."""

    interval: int = key(0, "save every so many steps (0: none by their number)")
    every_minutes: float | None = key(
        15.0,
        "save when the last save is so many minutes old, beside those of checkpoint.interval (0 or null: "
        "none by time)")
    keep: int | None = key(2, "newest good checkpoints to keep; null keeps all")
    async_save: bool = key(True, "write while training goes on")
    verify: Literal["full", "sizes"] = key(
        "full", "before loading compare checksums, or only sizes and headers of files")
    max_failed_saves: int = key(
        3, "stop after so many failed saves in a row; the one at the end must succeed")


@dataclass(frozen=True)
class LogConfig:
    """What a run prints and records."""

    interval: int = key(1, "print a step line every so many steps")
    heatmap_every: int = key(
        0, "draw tokens per expert in the terminal every so many steps (0: only at the end)")
    progress: bool = key(True, "progress bar on a terminal")
    sources: bool = key(False, "also record tokens per expert by source rank in loads.npz")
    router_dump: bool = key(
        False, "write what all routers decided in the first three steps, logits included, to log/router")
    routing: bool = key(
        False, "in evaluations, also record what experts are chosen for, on held-out text and on the same "
        "text in a random order, for the pictures of moetrain report; doubles their time")
    timeline: int = key(
        0, "steps of which every operator and its times are written to log/timeline, for Perfetto and "
        "moetrain report")
    timeline_start: int = key(2, "first of these steps; never the first step of a command")
    wandb: Literal["auto", "off", "offline", "online"] = key(
        "auto",
        "Weights & Biases, which never stops or slows a run; auto: as WANDB_MODE says, offline without it")
    wandb_project: str | None = key(
        None, "project of Weights & Biases; WANDB_PROJECT, else moetrain, when null")
    wandb_entity: str | None = key(None, "its user or team; WANDB_ENTITY when null")
    wandb_name: str | None = key(None, "name of the run there; WANDB_NAME, else run.name, when null")
    wandb_group: str | None = key(
        None, "group of the run there; a sweep sets it to run.name; WANDB_RUN_GROUP when null")
    wandb_tags: list[str] = key([], "tags there; WANDB_TAGS when empty")
    wandb_notes: str | None = key(None, "notes there; WANDB_NOTES when null")


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling, for `moetrain generate`."""

    prompt: str = key("", "text to continue")
    tokens: int = key(128, "tokens to generate")
    temperature: float = key(0.8, "0 takes the most probable token")
    top_p: float = key(0.95, "probability mass to sample from, in (0, 1]")
    seed: int = key(0, "seed of sampling")
    cache: bool = key(
        True, "keep keys and values of earlier tokens; false runs all of them again for every token")


@dataclass(frozen=True)
class Config:
    """The whole config of a run, by section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    router: dict[str, Any] = key({}, "the routing function: _target_ and its arguments")
    expert: dict[str, Any] = key(SWIGLU, "what an expert computes: _target_ and its arguments")
    capacity: dict[str, Any] = key({}, "what an expert takes at most: _target_ and its arguments")
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    planner: dict[str, Any] = key({}, "fssdp: who gets copies of which experts: _target_ and its arguments")
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    language_loss: dict[str, Any] = key(
        CROSS_ENTROPY, "the loss of the predictions: _target_ and its arguments")
    balance: dict[str, Any] = key({}, "the balance loss: _target_ and its arguments")
    loss: dict[str, Any] = key({}, "further losses by name: _target_ and arguments each")
    data: DataConfig = field(default_factory=DataConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    @property
    def data_seed(self) -> int:
        """The seed of the data: data.seed, or run.seed where it is null, as in runs older than data.seed."""
        return self.run.seed if self.data.seed is None else self.data.seed

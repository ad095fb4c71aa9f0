"""Banner of a run: what is trained, on what, and how, as (label, text) rows.

docs/reference/output.md defines every word of it. An empty text leaves its row out.
"""

import os
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from moetrain import __version__
from moetrain.comm.device import unused_gpu
from moetrain.config.compose import from_yaml
from moetrain.config.layer_pattern import sparse_layers
from moetrain.config.run_names import has_config
from moetrain.config.schema import CheckpointConfig, ModelConfig
from moetrain.config.sizes import count_parameters
from moetrain.config.taken_over import SECTIONS
from moetrain.config.values import flatten, show
from moetrain.data.account.text import left_out_line
from moetrain.files import nearby
from moetrain.losses.base import AuxLoss
from moetrain.moe.bank import is_expert_parameter
from moetrain.train.loggers.wandb_settings import wandb_line, wandb_settings
from moetrain.train.memory.graph_memory import max_copy_memory
from moetrain.train.state import Graphs, Run
from moetrain.units import decimal


def banner_lines(run: Run, resumed: Path | None) -> list[tuple[str, str]]:
    """Rows (label, text) of the banner at the start of an attempt.

    Args:
        run: the run, at the step from which it continues.
        resumed: the checkpoint that was loaded; None for a new run.
    """
    config, sizes = run.config, run.config.model
    ranks, ep = run.mesh["batch"].size, run.mesh["ep"].size
    per_step = config.train.global_batch * config.train.seq_len
    micro_batch = config.train.per_forward(ranks)
    accumulation = config.train.global_batch // (micro_batch * ranks)
    total, active, trained = parameter_counts(run)
    rows = [
        ("", f"moetrain {__version__} | run {nearby(run.directory)} | "
             + (f"resumed from step {run.state.step}" if resumed else "new run")),
        ("model", f"{layers_text(sizes)}  d {sizes.dim}  {sizes.num_experts} experts top-{sizes.top_k}"
                  f" + {sizes.num_shared_experts} shared   total {decimal(total)}"
                  f"   active {decimal(active)}"
                  + (f"   trained {decimal(trained)}" if trained < total else "")),
        ("ahead", ahead_line(run)),
        ("weights", weights_line(run)),
        ("parallel", f"{ranks} rank{'s' * (ranks > 1)} = EP {ep} x DP {ranks // ep}   "
                     f"{config.parallel.mode}{sharding(run)}"
                     f" on {run.mesh.device.type}, {config.run.dtype}   {threads_text()}"),
        ("device", unused_gpu(config)),
        ("schedule", schedule_line(run)),
        ("batch", f"{per_step:,} tokens = {ranks} rank{'s' * (ranks > 1)} x {micro_batch} seq"
                  f" x {config.train.seq_len} x accum {accumulation}"),
        ("router", router_line(run)),
        ("balance", balance_line(run, accumulation)),
        ("losses", ", ".join(f"{name}, weight {weight:g}" for name, weight in run.objective.weights.items()
                             if name != "balance")),
        ("copies", copies_line(run)),
        ("capacity", capacity_line(run)),
        ("data", data_line(run)),
        ("skipped", skipped(run)),
        ("memory", {"none": "", "selective": "recomputes norms, activations and orders",
                    "full": "recomputes whole blocks"}[config.train.activation_checkpointing]),
        ("saves", saves_line(config.checkpoint)),
    ]
    rows.append(("wandb", wandb_line(wandb_settings(config, os.environ), run.directory)))
    return [row for row in rows if row[1]]


def layers_text(sizes: ModelConfig) -> str:
    """Number of layers, and of those with experts where others have none."""
    sparse = len(sparse_layers(sizes))
    return f"{sizes.num_layers} layers{f', {sparse} with experts' * (sparse < sizes.num_layers)}"


def ahead_line(run: Run) -> str:
    """Modules of multi-token prediction; empty without any."""
    sizes = run.config.model
    if not sizes.mtp_layers:
        return ""
    without = count_parameters(replace(sizes, mtp_layers=0), 0, run.config.expert).total
    added = count_parameters(sizes, 0, run.config.expert).total - without
    return (f"{sizes.mtp_layers} module{'s' * (sizes.mtp_layers > 1)} of multi-token prediction, weight "
            f"{sizes.mtp_weight:g}   {decimal(added)} of these parameters, in training alone")


def weights_line(run: Run) -> str:
    """What the run began from; empty if from random weights."""
    init = run.config.init
    if init.from_ is None:
        return ""
    source = f"{nearby(Path(init.from_))}, digest {str(init.digest)[:12]}"
    if run.state.step:
        return f"began from {source}; its own checkpoint goes on"
    return f"from {source}{_taken_over(run)}"


def _taken_over(run: Run) -> str:
    """What the run has in common with the one that its weights come from, and by which keys it differs."""
    path = Path(str(run.config.init.from_)).parents[1]
    if not has_config(path):
        return ""
    ours, theirs = (flatten(config) for config in (run.config, from_yaml(path / "config.yaml")))
    same, differ = [], []
    for part in (*SECTIONS, "data.tokenizer"):
        keys = [key for key in {**ours, **theirs} if key == part or key.startswith(f"{part}.")]
        found = [key for key in keys if ours.get(key) != theirs.get(key)]
        if not found:
            same.append(part.removeprefix("data."))
        differ += found
    text = f"; its {', '.join(same)}" if same else ""
    return text + (f"; other than there: {', '.join(f'{key} {show(ours.get(key))}' for key in differ[:4])}"
                   f"{', …' * (len(differ) > 4)}" if differ else "")


def threads_text() -> str:
    """Number of torch's threads on this rank, and of the cores that it may use."""
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    return f"{threads} thread{'s' * (threads > 1)} a rank, {cores} core{'s' * (cores > 1)}"


def skipped(run: Run) -> str:
    """Content of the source that is not trained on, by reason."""
    account = getattr(run.dataset, "account", None)
    return left_out_line(account) if account else ""


def data_line(run: Run) -> str:
    """The training data, and its epochs by `run.steps`."""
    dataset, train = run.dataset, run.config.train
    names = ", ".join(dataset.domains[:6]) + ", ..." * (len(dataset.domains) > 6)
    text = (f"{run.config.data.kind} {dataset.fingerprint[:12]}  "
            f"{len(dataset.domains)} domain{'s' * (len(dataset.domains) > 1)}"
            f" ({names})  vocabulary {dataset.vocab_size}")
    if (rows := run.state.model.embed.shape[0]) > dataset.vocab_size:
        text += f", padded to {rows}"
    if rates := run.config.denoising.rates:
        text += f"  corrupted by {', '.join(rates)}"
    if dataset.tokens is None:
        return text
    epochs = dataset.epochs(run.config.run.steps * train.global_batch)
    least, most = (f"{many:.2g}" for many in (epochs[epochs > 0].min(), epochs.max()))
    planned = (f"{least} epochs" if least == most else
               f"{least} to {most} epochs, most of {dataset.domains[int(epochs.argmax())]},")
    return f"{text}  {decimal(dataset.tokens)} tokens, {planned} planned"


def saves_line(config: CheckpointConfig) -> str:
    """When checkpoints are written."""
    every = [f"every {config.interval} steps"] if config.interval else []
    every += [f"every {config.every_minutes:g} minutes"] if config.every_minutes else []
    return f"{', '.join(every)} and at the end" if every else "at the end"


def sharding(run: Run) -> str:
    """Number of ranks over which FSDP shards dense parameters and experts."""
    dense, experts = run.mesh["dense_shard"].size, run.mesh["expert_shard"].size
    return f" (dense over {dense}, experts over {experts})" if dense > 1 else ""


def schedule_line(run: Run) -> str:
    """How tokens are dispatched to experts and combined; empty without expert parallelism."""
    banks = list(run.state.model.banks.values())
    if not banks or run.mesh["ep"].size == 1:
        return ""
    chunks = banks[0].num_chunks
    pieces = "in one piece" if chunks == 1 else f"in {chunks} chunks"
    rows = ("a row for every expert of a token" if run.config.parallel.exact_combine else
            "a row for every rank with experts of a token")
    exchange = run.config.parallel.exchange
    return f"{pieces} to the experts and back, {rows}{f', exchange {exchange}' * (exchange != 'flat')}"


def copies_line(run: Run) -> str:
    """How experts are copied to other ranks, with parallel=fssdp."""
    parallel = run.config.parallel
    if run.state.planning is None:
        return ""
    # A planner's file has the name of its config value.
    planner = str(run.config.planner["_target_"]).split(".")[-2]
    homes = (f"homes looked at every {parallel.rehome_interval} steps" if parallel.rehome_interval else
             "homes stay")
    loads = f"the mean of {parallel.window} steps" if parallel.forecast == "mean" else "the trend of loads"
    memory, sliced = max_copy_memory(run), parallel.max_sliced_experts
    cut_up = f", up to {sliced} of the hottest of a layer cut up" if sliced else ""
    return (f"planned by {planner} from {loads}{', more after the gate' * parallel.calibrate}, "
            f"up to {parallel.max_copies} a rank"
            f" and layer{', passed on inside nodes' * (parallel.collective == 'two_level')}"
            f"{', gathered again for backward' * parallel.rematerialize}: "
            f"at most {decimal(memory.copies, 'B')} of copies and "
            f"{decimal(memory.sums, 'B')} of their gradients; {homes}{cut_up}")


def capacity_line(run: Run) -> str:
    """Capacity policies of the layers; empty if no slot can be dropped."""
    policies = {layer.capacity.describe() for layer in run.state.model.sparse_layers}
    return "; ".join(sorted(policies - {"dropless"}))


def router_line(run: Run) -> str:
    """Routers whose decisions depend on how a batch is split; empty if there are none."""
    # A router's file has the name of its config value.
    return "; ".join(sorted({
        f"{type(router).__module__.rpartition('.')[2]}   depends on: {router.depends_on_split}"
        for router in run.state.model.routers.values() if router.depends_on_split}))


def balance_line(run: Run, accumulation: int) -> str:
    """The balance loss; selection biases by quantiles; losses and biases that depend on the split of a batch.

    Args:
        run: the run.
        accumulation: micro-batches of a rank in a step.
    """
    text = _loss_text(run, accumulation)
    for name, loss in run.objective.losses.items():
        depends = _depends_on(loss, accumulation)
        if name != "balance" and loss.weight and depends:
            text += f"; {name}   depends on: {', '.join(depends)}"
    if any(router.margin_quantile for router in run.state.model.routers.values()):
        text += "; biases by quantiles of the global batch"
    return (f"{text}; biases by the counts of micro-batches   depends on: ranks, accumulation"
            if run.state.model.routers_needing_load_error else text)


def _loss_text(run: Run, accumulation: int) -> str:
    loss = run.objective.losses["balance"]
    if not loss.weight:
        return "no balance loss"
    rule = run.objective.pool
    text = (f"{loss.scope} loss, weight {loss.weight:g}" if rule is None else
            f"{loss.scope}-batch loss, {rule.mode}, weight {loss.weight:g}")
    if depends := _depends_on(loss, accumulation):
        text += f"   depends on: {', '.join(depends)}"
    if rule is None or rule.mode != "exact" or accumulation == 1:
        return text
    return f"{text}   {_graphs_text(run.graphs, accumulation)}"


def _depends_on(loss: AuxLoss, accumulation: int) -> list[str]:
    """What of the split of a batch the value of a loss depends on."""
    depends = {"micro": ["ranks", "accumulation"], "node": ["ranks of a machine"]}.get(
        getattr(loss, "scope", ""), [])
    pooled = loss.pool is not None and loss.pool.mode != "exact" and accumulation > 1
    return [*depends, "accumulation"] if pooled else depends


def _graphs_text(graphs: Graphs, accumulation: int) -> str:
    """How an exact balance loss obtains the counts of the step, with the sizes that decided it."""
    if graphs.graph is None:
        return (f"keeps the graphs of {accumulation} micro-batches" if graphs.kept else
                "counts in a pass of its own")
    sizes = f"{accumulation} x {decimal(graphs.graph, 'B')}, {decimal(graphs.free, 'B')} free"
    return (f"keeps the graphs of {accumulation} micro-batches ({sizes})" if graphs.kept else
            f"counts in a pass of its own (graphs would take {sizes})")


def parameter_counts(run: Run) -> tuple[int, int, int]:
    """Count the parameters of the model on all ranks: all of them, those that a token uses, those trained."""
    model = run.state.model
    is_expert = is_expert_parameter(model)
    shared = [parameter for parameter in model.parameters() if not is_expert(parameter)]
    dense = sum(parameter.numel() for parameter in shared)
    trained = sum(parameter.numel() for parameter in shared if parameter.requires_grad)
    experts = active = 0
    for name, routed in model.banks.items():
        one = routed.bank.form.numbers
        experts += one * routed.dispatcher.placement.num_experts
        trained += routed.dispatcher.placement.num_experts * sum(
            prod(routed.bank.form.shapes[name]) for name in routed.bank.trainable)
        active += one * sum(model.routers[router].max_slots() for router in model.feeds[name])
    return dense + experts, dense + active, trained

"""Every rule between keys, in one list, and the check that runs them.

A rule is a pure function in config/rules/, which has one file per subject. It yields a ConfigError for every
contradiction that it finds. `where` names the keys involved, separated by ", ", the one to change first;
config/tree.py replaces them by the override or the yaml file that set them.

Ranges of numbers are no rules of their own: those of the schema stand in config/rules/ranges.py, those of a
part in the BOUNDS of its class.
"""

import os
from collections.abc import Callable, Iterator

from moetrain.config.rules import (
    attention,
    data,
    latent_attention,
    losses,
    model,
    multi_token,
    optim,
    parallel,
    paths,
    ranges,
    rotary,
    routers,
    run,
    train,
)
from moetrain.config.schema import Config
from moetrain.errors import ConfigError

Rule = Callable[[Config, int], Iterator[ConfigError]]


def world_size(config: Config) -> int:
    """Return the number of ranks: WORLD_SIZE under torchrun or moetrain's own launcher, else run.nproc."""
    world = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
    return int(world) if world.isdigit() and int(world) > 0 else config.run.nproc


def check(config: Config, ranks: int, *, trains: bool = True) -> list[ConfigError]:
    """List every contradiction of a config. Where a value is out of range, only the ranges are reported.

    Args:
        config: the config.
        ranks: number of ranks.
        trains: whether the command trains; otherwise the rules that concern training are left out.
    """
    first, *others = (rule for rule in RULES if trains or rule not in OF_TRAINING)
    return list(first(config, ranks)) or [error for rule in others for error in rule(config, ranks)]


# In the order in which their errors are shown. The first one decides whether the others run at all.
RULES: list[Rule] = [
    ranges.ranges,
    paths.empty_paths,
    paths.unknown_homes,
    run.run_name,
    run.stop,
    model.heads,
    rotary.rotary_channels,
    rotary.rope_scaling,
    rotary.residual_stream,
    latent_attention.latent_attention,
    attention.sliding_layers,
    model.attention_experts,
    model.layers,
    model.layer_pattern,
    model.dense_width,
    model.sliced_quantized,
    model.vocabulary,
    model.experts,
    model.experts_of_a_token,
    model.mapped_logits,
    model.router_gradient,
    model.groups,
    model.quantiles_of_groups,
    routers.fixed_top_k,
    routers.second_by_gates,
    routers.choice_capacity,
    routers.growing_k,
    routers.constants_of_the_width,
    routers.domain_lists,
    parallel.mode,
    parallel.sharded,
    parallel.expert_parallel,
    parallel.schedule,
    parallel.chunks,
    parallel.sliced,
    parallel.copies,
    train.batch,
    data.data_path,
    data.domain_weights,
    data.reading,
    data.denoising,
    optim.betas,
    losses.loss_names,
    losses.pools,
    losses.equal_groups,
    routers.load_of_noise,
    losses.needed_sums,
    multi_token.targets_ahead,
    multi_token.scored_ahead,
    multi_token.experts_by_tokens,
    ranges.divisions,
    parallel.engine,
]
# Not asked of evaluation and generation: what they refuse is legal there, because it is about batches,
# losses, gradients, the optimizer or copies of experts.
OF_TRAINING: frozenset[Rule] = frozenset([
    run.stop, model.router_gradient, routers.growing_k, parallel.chunks, parallel.sliced, parallel.copies,
    parallel.engine, train.batch, data.domain_weights, data.denoising, optim.betas, losses.loss_names,
    losses.pools,
    losses.equal_groups, losses.needed_sums, multi_token.targets_ahead, multi_token.scored_ahead,
    multi_token.experts_by_tokens, routers.load_of_noise,
])

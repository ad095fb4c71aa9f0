"""What routers are told: the same fields in training, count pass, evaluation and generation.

A router that reads what is not known there is refused, by its flags `depends_on` and `causal`.

Shapes: B sequences, S positions, T = B*S tokens.
"""

from collections.abc import Sequence, Set

import torch
from torch import Tensor, nn

from moetrain.errors import ConfigError
from moetrain.routers.base import Router, RouterContext


def token_context(tokens_BS: Tensor, *, seed: int, step: int, training: bool, sample_ids_B: Tensor,
                  valid_BS: Tensor | None = None, domains_B: Tensor | None = None, first: int = 0,
                  draw: int = 0, draws: int = 1, per_sequence: bool = False) -> RouterContext:
    """Build what routers may know of a micro-batch; per-token fields are flattened to [T].

    Args:
        tokens_BS: int64 [B, S], the inputs of the model.
        seed: seed of the run, for keyed randomness.
        step: step that trains, from 1, or the last one that trained the weights; 0 for weights without one.
        training: whether the pass trains.
        sample_ids_B: int64 [B].
        valid_BS: bool [B, S], false for padding; None where there is none.
        domains_B: int64 [B]; None where the domains of the run say nothing about the text.
        first: position of the first token; above 0 behind a key-value cache.
        draw: number of the draw of a micro-batch that runs several times.
        draws: times that the tokens have the same sequences, one after the other, with draws from `draw` on.
        per_sequence: whether the statistics have sums of each sequence.

    Returns:
        The context of every router of the pass; each layer adds the name of its own.
    """
    length, device = tokens_BS.shape[1], tokens_BS.device

    def of_each_token(values: Tensor) -> Tensor:
        return values.expand_as(tokens_BS).flatten()

    valid_BS = torch.ones_like(tokens_BS, dtype=torch.bool) if valid_BS is None else valid_BS
    return RouterContext(
        training=training,
        step=step,
        seed=seed,
        draw=draw,
        draws=draws,
        sample_ids_T=of_each_token(sample_ids_B[:, None]),
        positions_T=of_each_token(torch.arange(first, first + length, device=device)),
        valid_T=valid_BS.flatten(),
        token_ids_T=tokens_BS.flatten(),
        domains_T=None if domains_B is None else of_each_token(domains_B[:, None]),
        seq_offsets=torch.arange(0, tokens_BS.numel() + 1, length, device=device) if per_sequence else None,
    )


def sequence_of(context: RouterContext, tokens: int, device: torch.device) -> Tensor:
    """Number the sequences of a micro-batch; a new one begins at every position 0.

    Sample ids would not do, since one may occur twice.

    Args:
        context: positions of the tokens; without them all tokens are one sequence.
        tokens: T.
        device: of the result.

    Returns:
        int64 [T] in [0, T), the number of each token's sequence.
    """
    if context.positions_T is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device)
    return ((context.positions_T == 0).cumsum(0) - 1).clamp(min=0)


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Find the routers of a model by the name of their module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def refuse_unknown(model: nn.Module, unknown: Set[str], what: str) -> None:
    """Raise ConfigError where a router reads a field that is not known of a text.

    Args:
        model: the model.
        unknown: fields of RouterContext.
        what: the text, for the error.
    """
    for name, router in routers_of(model).items():
        if missing := sorted(router.depends_on & unknown):
            raise ConfigError(
                210, f"{what} has no {' and no '.join(missing)}", where=name,
                why=f"{type(router).__name__} chooses by it (depends_on), and would choose otherwise than in "
                    "training",
                next="moetrain eval on the text that the run held out, or train with another router")


def refuse_other_domains(model: nn.Module, domains: Sequence[str]) -> None:
    """Raise ConfigError where a router tells apart more or fewer domains than the data has.

    Args:
        model: the model.
        domains: names of the domains of the data, in their order.
    """
    for name, router in routers_of(model).items():
        if router.num_domains not in (None, len(domains)):
            names = ", ".join(domains[:8]) + ", ..." * (len(domains) > 8)
            raise ConfigError(
                262, f"{type(router).__name__} has {router.num_domains} domains, and the data {len(domains)}",
                where="router.experts, data.path",
                why=f"every domain of the data needs a list of experts, in their order: {names}",
                next=f"router.experts with {len(domains)} lists, one for each domain")


def refuse_noncausal(model: nn.Module, *, allowed: bool) -> None:
    """Raise ConfigError where a router's choices for a token depend on later tokens, unless that is allowed.

    Args:
        model: the model.
        allowed: `eval.allow_noncausal`.
    """
    for name, router in routers_of(model).items():
        if not router.causal and not allowed:
            raise ConfigError(
                211, f"{type(router).__name__} looks at later tokens", where=name,
                why="a loss that is measured so knows of the tokens that it predicts, and a text that is "
                    "being written has none (causal = False)",
                next="eval.allow_noncausal=true to measure and write nevertheless, or another router")

"""Gradient of the balance loss at the router weights, as five trainers compute it, beside the true one.

    python -m tools.study.balance_gradients                      writes docs/results/balance_gradients.md

One global batch of one optimizer step, 16 sequences of four domains, goes through two routers. It is split
over ranks and accumulation in every way of a table, with and without padding, and once with all sequences
equal; each split and trainer gives a gradient, and the gradient of E sum_i f_i P_i over the batch in one
piece, by autograd, is the truth. Conventions are taken out first, so that everyone's perfect is 1 and the
loss the mean over routers. Ranks are simulated in one process: each has its own tokens, sums over ranks are
sums, and gradients are averaged over ranks where a trainer does so, which is all but ours. float64, but for
the parts that transformers computes in float32.

Ours is what the package computes: LoadBalanceLoss of the pooled counts for the slopes; `at_logits` has the
closed form of the gradient at the logits. transformers is asked itself. The others are written anew from
their published formulas; tools/study/balance_gradients_report.py names the files, and writes the page.

Shapes: T tokens, D width, E experts, K slots.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.ops.gating import top_k
from moetrain.ops.router_sums import RouterSums, router_sums
from moetrain.train.count_pool import AccumulatedCounts

SEQUENCES, LENGTH, DOMAINS, DIM, EXPERTS, SLOTS, ROUTERS = 16, 32, 4, 16, 16, 2, 2
SPLITS = [(ranks, turns) for ranks in (1, 2, 4) for turns in (1, 4)]
BATCHES = ("full", "padded", "alike")


class Part(NamedTuple):
    """A micro-batch of a rank, with the logits of each router and their graph."""

    x_TD: Tensor
    valid_T: Tensor
    logits: list[Tensor]

    def ids(self, router: int) -> Tensor:
        """Chosen experts, int64 [T, K]; padding chooses too, as in trainers that do not mask it."""
        return top_k(self.logits[router], SLOTS)[1]

    def counts(self, router: int, masked: bool = True) -> Tensor:
        ids_TK = self.ids(router)[self.valid_T] if masked else self.ids(router)
        return torch.bincount(ids_TK.flatten(), minlength=EXPERTS).double()

    def probs(self, router: int, masked: bool = True) -> Tensor:
        probs_TE = self.logits[router].softmax(-1)
        return probs_TE[self.valid_T] if masked else probs_TE

    @property
    def tokens(self) -> Tensor:
        return self.valid_T.sum().double()


Split = list[list[Part]]                                 # [rank][turn]


# --- what each trainer minimizes in a step, gradients averaged or summed as it does; perfect = 1, mean over
# routers


def whole(split: Split) -> Tensor:
    """Loss of the batch in one piece, E sum_i f_i P_i: the truth."""
    parts = [part for rank in split for part in rank]
    total = 0.0
    for router in range(ROUTERS):
        counts_E = sum(part.counts(router) for part in parts)
        probs_E = torch.cat([part.probs(router) for part in parts]).mean(0)
        total = total + EXPERTS * (counts_E / counts_E.sum() * probs_E).sum()
    return total / ROUTERS


def megatron(split: Split, *, per_token: bool = False) -> Tensor:
    """Megatron's aux_loss: counts, tokens and probabilities of the micro-batch, averaged over ranks.

    It is scaled by 1 / turns; with per_token by the valid tokens, and divided by those of the step.
    """
    step_tokens = sum(part.tokens for rank in split for part in rank)
    total = 0.0
    for rank in split:
        for part in rank:
            weight = part.tokens / step_tokens if per_token else 1 / (len(rank) * len(split))
            losses = (_switch(part, part.counts(router), part.tokens, router) for router in range(ROUTERS))
            total = total + weight * sum(losses)
    return total / ROUTERS


def megatron_global(split: Split) -> Tensor:
    """Megatron's global_aux_loss, scaled by 1 / turns and averaged over ranks.

    The counts of the turns so far, over ranks, are divided by the number of those turns. The tokens are those
    of this turn over ranks, the probabilities those of this rank.
    """
    total = 0.0
    for router in range(ROUTERS):
        running_E = torch.zeros(EXPERTS, dtype=torch.float64)
        for turn, parts in enumerate(zip(*split), 1):
            running_E = running_E + sum(part.counts(router) for part in parts)
            tokens = sum(part.tokens for part in parts)
            losses = (_switch(part, running_E / turn, tokens, router) for part in parts)
            total = total + sum(losses) / (len(split[0]) * len(split))
    return total / ROUTERS


def _switch(part: Part, counts_E: Tensor, tokens: Tensor, router: int) -> Tensor:
    return EXPERTS / (SLOTS * tokens**2) * (counts_E * part.probs(router).sum(0)).sum()


def transformers_trainer(split: Split) -> Tensor:
    """load_balancing_loss_func of transformers, of a micro-batch's logits of all routers.

    Trainer divides the cross-entropy by the tokens of the step and multiplies the whole by the ranks over
    which gradients are averaged: what the function adds is summed over ranks and turns.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    return sum(load_balancing_loss_func(tuple(part.logits), EXPERTS, SLOTS, part.valid_T[None].long())
               for rank in split for part in rank) / SLOTS


def olmo(split: Split) -> Tensor:
    """OLMo-core's local_batch, averaged over ranks.

    Counts and mean probabilities are of all positions, padding too, over the valid tokens of the rank's step.
    """
    total = 0.0
    for rank in split:
        rank_tokens = sum(part.tokens for part in rank)
        for part in rank:
            losses = (part.counts(router, masked=False) * part.probs(router, masked=False).mean(0)
                      for router in range(ROUTERS))
            total = total + EXPERTS / SLOTS * sum(losses).sum() / rank_tokens / len(split)
    return total / ROUTERS


def xtuner(split: Split, *, over_ranks: bool = True) -> Tensor:
    """XTuner's loss: counts and probabilities of a turn over ranks, or of a rank's, over the number of turns.

    The all-reduce of probabilities sums gradients too, so that averaging them over ranks leaves that of the
    sum.
    """
    total = 0.0
    turns = list(zip(*split))
    for turn in turns:
        for parts in [turn] if over_ranks else [(part,) for part in turn]:
            tokens = sum(part.tokens for part in parts)
            for router in range(ROUTERS):
                counts_E = sum(part.counts(router) for part in parts)
                probs_E = sum(part.probs(router).sum(0) for part in parts)
                value = EXPERTS / (SLOTS * tokens) * (counts_E * probs_E / tokens).sum()
                total = total + value / (1 if over_ranks else len(split))
    return total / len(turns) / ROUTERS


def by_autograd(loss: Callable[[Split], Tensor]) -> Callable[[Split, list[Tensor]], Tensor]:
    """Gradient of a loss at the router weights, flat."""
    def gradient(split: Split, weights: list[Tensor]) -> Tensor:
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss(split), weights)])
    return gradient


def at_logits(logits_TE: Tensor, slope_E: Tensor, valid_T: Tensor) -> Tensor:
    """Gradient at the logits from that at each expert's probability sum: p (a - <p, a>), 0 in padding.

    Args:
        logits_TE: float64 [T, E], logits.
        slope_E: float64 [E], gradient at the sum of each expert's probabilities.
        valid_T: bool [T], false in padding.
    """
    probs_TE = logits_TE.softmax(-1).where(valid_T[:, None], 0)
    return probs_TE * (slope_E - (probs_TE * slope_E).sum(-1, keepdim=True))


def ours(scope: str, mode: str = "exact") -> Callable[[Split, list[Tensor]], Tensor]:
    """Gradient by the package's loss and its closed form: nothing here is differentiated."""
    loss = LoadBalanceLoss(scope=scope, mode=mode)

    def gradient(split: Split, weights: list[Tensor]) -> Tensor:
        grads, tokens = [], sum(part.valid_T.sum() for rank in split for part in rank)
        for router, weight in enumerate(weights):
            turns = [[(part, _sums(part, router)) for part in turn] for turn in zip(*split)]
            counts = [sum(stats.counts_E for _, stats in turn) for turn in turns]
            known, grad_ED = AccumulatedCounts(mode, {"": EXPERTS}, tokens, None), torch.zeros_like(weight)
            for number, turn in enumerate(turns, 1):
                last = number == len(turns)
                counts_E = sum(counts) if mode == "exact" else known.add(counts[number - 1], last=last)
                for part, stats in turn:
                    (slope_E,) = loss.slopes(stats, Pooled(counts_E, tokens)).values()
                    grad_TE = at_logits(part.logits[router].detach(), slope_E, part.valid_T)
                    grad_ED += grad_TE.T @ part.x_TD / ROUTERS
            grads.append(grad_ED.flatten())
        return torch.cat(grads).detach()
    return gradient


def _sums(part: Part, router: int) -> RouterSums:
    """Sums of a router over a micro-batch, as training computes them."""
    ids_TK = part.ids(router).where(part.valid_T[:, None], -1)
    return router_sums(part.probs(router, masked=False), part.logits[router], ids_TK, part.valid_T)


TRAINERS = {
    "moetrain, `balance=global` (default)": ours("global"),
    "moetrain, `balance.mode=sync`": ours("global", "sync"),
    "moetrain, `balance.mode=buffer`": ours("global", "buffer"),
    "moetrain, `balance=micro`": ours("micro"),
    "Megatron-LM, `aux_loss`": by_autograd(megatron),
    "Megatron-LM, `aux_loss`, per-token loss": by_autograd(lambda split: megatron(split, per_token=True)),
    "Megatron-LM, `global_aux_loss`": by_autograd(megatron_global),
    "transformers and its Trainer": by_autograd(transformers_trainer),
    "OLMo-core, `local_batch`": by_autograd(olmo),
    "XTuner, global average (default)": by_autograd(xtuner),
    "XTuner, without": by_autograd(lambda split: xtuner(split, over_ranks=False)),
}


# --- the batch, its splits, and what is found


def compare(seed: int = 0) -> dict[tuple[str, str, tuple[int, int]], tuple[float, float]]:
    """Relative L2 error of each gradient and its length over the true one's, by trainer, batch and split."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(EXPERTS, DIM, dtype=torch.float64, generator=generator).div(2).requires_grad_()
               for _ in range(ROUTERS)]
    domains_MD = 2 * torch.randn(DOMAINS, DIM, dtype=torch.float64, generator=generator)
    noise = torch.randn(SEQUENCES, LENGTH, DIM, dtype=torch.float64, generator=generator)
    x = domains_MD.repeat_interleave(SEQUENCES // DOMAINS, 0)[:, None] + noise  # neighbors share a domain
    one = domains_MD.repeat(LENGTH // DOMAINS, 1) + noise[0]                    # has all of them
    lengths = torch.randint(LENGTH // 8, LENGTH + 1, (SEQUENCES,), generator=generator)
    found = {}
    for batch in BATCHES:
        x_BSD = one.expand_as(x) if batch == "alike" else x
        kept = lengths if batch == "padded" else lengths.new_full((SEQUENCES,), LENGTH)
        valid = torch.arange(LENGTH) < kept[:, None]
        truth = by_autograd(whole)(cut(x_BSD, valid, weights, 1, 1), weights)
        for ranks, turns in SPLITS:
            for name, gradient in TRAINERS.items():
                theirs = gradient(cut(x_BSD, valid, weights, ranks, turns), weights)
                found[name, batch, (ranks, turns)] = (
                    ((theirs - truth).norm() / truth.norm()).item(), (theirs.norm() / truth.norm()).item())
    return found


def cut(x: Tensor, valid: Tensor, weights: list[Tensor], ranks: int, turns: int) -> Split:
    """Split a batch: consecutive sequences to a micro-batch, consecutive micro-batches to a turn.

    Args:
        x: float64 [sequences, positions, D].
        valid: bool [sequences, positions].
        weights: router weights, float64 [E, D] each.
        ranks: number of ranks.
        turns: micro-batches of a rank.
    """
    def part(numbers: Tensor) -> Part:
        x_TD = x[numbers].flatten(0, 1)
        return Part(x_TD, valid[numbers].flatten(), [x_TD @ weight.T for weight in weights])

    numbers = torch.arange(SEQUENCES).view(turns, ranks, -1)
    return [[part(numbers[turn, rank]) for turn in range(turns)] for rank in range(ranks)]


def main() -> None:
    from tools.study.balance_gradients_report import page

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    page_path = Path(__file__).parents[2] / "docs" / "results" / "balance_gradients.md"
    parser.add_argument("--out", type=Path, default=page_path)
    out = parser.parse_args().out
    out.write_text(page(compare(), list(TRAINERS), SPLITS))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

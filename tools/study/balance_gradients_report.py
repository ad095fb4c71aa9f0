"""Page of tools/study/balance_gradients.py: docs/results/balance_gradients.md."""

import transformers

Found = dict[tuple[str, str, tuple[int, int]], tuple[float, float]]

SOURCES = [
    ("Megatron-LM", "`megatron/core/transformer/moe/router.py`, `moe_utils.py`, "
                    "`megatron/core/pipeline_parallel/schedules.py`", "NVIDIA/Megatron-LM d98e8a6"),
    ("OLMo-core", "`src/olmo_core/nn/moe/loss.py`, `router.py`, "
                  "`src/olmo_core/train/train_module/transformer/train_module.py`",
     "allenai/OLMo-core fa6c501"),
    ("XTuner", "`xtuner/v1/loss/moe_loss.py`, `aux_loss.py`", "InternLM/xtuner b934f46"),
]


class Results:
    """Figures of the page.

    Args:
        found: relative error and length of the gradient, by trainer, batch and split.
        trainers: names of the trainers.
        splits: ranks × accumulation; the first is 1 × 1.
    """

    def __init__(self, found: Found, trainers: list[str], splits: list[tuple[int, int]]) -> None:
        self.found, self.trainers, self.splits = found, trainers, splits

    def table(self, batch: str) -> str:
        """Table of a batch: a row for each trainer, a column for each split."""
        head = "| | " + " | ".join(f"{ranks} × {turns}" for ranks, turns in self.splits) + " |\n"
        rows = (" | ".join([name, *(_cell(*self.found[name, batch, split]) for split in self.splits)])
                for name in self.trainers)
        return head + "|---|" + "---|" * len(self.splits) + "\n" + "".join(f"| {row} |\n" for row in rows)

    def of(self, name: str, batch: str, ranks: int, turns: int) -> tuple[float, float]:
        """Error and length of the first trainer whose name begins so."""
        full = next(full for full in self.trainers if full.startswith(name))
        return self.found[full, batch, (ranks, turns)]

    def lengths(self, name: str) -> str:
        """Lengths over that at 1 × 1, of equal sequences."""
        alone = self.of(name, "alike", 1, 1)[1]
        return ", ".join(f"{self.of(name, 'alike', *split)[1] / alone:.2f}" for split in self.splits)

    def error(self, name: str, batch: str, ranks: int, turns: int) -> str:
        return f"{self.of(name, batch, ranks, turns)[0]:.2f}"

    def worst(self, name: str) -> float:
        """Largest error of the trainers whose name contains this."""
        return max(error for (full, _, _), (error, _) in self.found.items() if name in full)


def page(found: Found, trainers: list[str], splits: list[tuple[int, int]]) -> str:
    """The page, as Markdown.

    Args:
        found: relative error and length of the gradient, by trainer, batch and split.
        trainers: names of the trainers.
        splits: ranks × accumulation; the first is 1 × 1.
    """
    results = Results(found, trainers, splits)
    sources = "\n".join(f"| {name} | {files} | {commit} |" for name, files, commit in SOURCES)
    return f"""# The balance loss's gradient, as trainers compute it

Written by `tools/study/balance_gradients.py`. One optimizer step on one global batch of 16 sequences from 4
domains, 2 routers, 16 experts, top 2; the same batch split over *ranks × accumulation*. A cell is the
relative L2 error of the gradient at the router weights against that of E Σ f P over the batch in one piece,
and in brackets its length over that gradient's. Neighboring sequences share a domain, so micro-batches are
unlike each other. Conventions are taken out: everyone's perfect is 1, and the loss is the mean over routers.

Ranks are simulated in one process: sums and means over ranks are arithmetic. Ours sums gradients over ranks;
the others average them, as DDP and FSDP2 do by default. Ours is what the package computes, and that real
ranks give the same is tested to 1e-10 (`tests/integration/test_balance.py`). transformers
{transformers.__version__} is asked itself; what its Trainer makes of it is by `trainer.py` (`compute_loss`,
`training_step`), with `average_tokens_across_devices` on, as by default. The others are written anew from
their formulas, not run:

| | file | commit |
|---|---|---|
{sources}

## Without padding

{results.table("full")}
## Sequences of 4 to 32 tokens, padded to 32

{results.table("padded")}
## All sequences equal

Then it does not matter what f is counted over, and what is left is the scale.

{results.table("alike")}
{_findings(results)}"""


def _findings(results: Results) -> str:
    """What the tables show."""
    megatron, buffer = "Megatron-LM, `global", "moetrain, `balance.mode=buffer"
    ours = results.worst("global` (default)")
    return f"""\
## What shows

- **Ours** is exact for every split, with padding too: largest error {ours:.1e}.
- **Counts of a micro-batch** (Megatron's `aux_loss`, OLMo-core, XTuner without global average, transformers;
  ours with `balance=micro`) pull at another thing than the balance of the batch; the error of `balance=micro`
  is what that scope alone does. `sync` (XTuner's default) cures it over ranks only; `buffer` (Megatron's
  `global_aux_loss`) for the later turns.
- **Megatron's `global_aux_loss` has 1/ranks of its coefficient**: the tokens of all ranks divide it, and then
  gradients are averaged over ranks. Lengths in the order of the third table:
  {results.lengths(megatron)}. And its running counts are divided by the tokens of the current turn:
  with padding, at 1 × 4, the error is {results.error(megatron, "padded", 1, 4)} where our `buffer` has
  {results.error(buffer, "padded", 1, 4)}; without padding both have
  {results.error(megatron, "full", 1, 4)} there.
- **Means of means.** With padding, Megatron's `aux_loss` gives a micro-batch the same weight however few
  tokens it has: at 4 × 4 the error is {results.error("Megatron-LM, `aux_loss`", "padded", 4, 4)}, with its
  per-token loss {results.error("Megatron-LM, `aux_loss`, per-token", "padded", 4, 4)}, that of
  `balance=micro`. XTuner does the same to turns: {results.error("XTuner, global", "padded", 4, 4)} at 4 × 4,
  our `sync` {results.error("moetrain, `balance.mode=sync", "padded", 4, 4)}.
- **transformers' Trainer sums the balance loss over ranks and accumulation**, while the cross-entropy is
  divided by the tokens of the whole step: the coefficient grows with both. Lengths over that at 1 × 1:
  {results.lengths("transformers")}. At 1 × 1 the error is {results.error("transformers", "full", 1, 1)},
  because its function adds up the counts of all routers before it multiplies: experts of one number in
  different layers stand for each other.
- **OLMo-core counts padding**: nothing masks it in counts or probabilities, and the sum is divided by the
  valid tokens alone. At 1 × 1, where every scope is the same, the error is
  {results.error("OLMo-core", "padded", 1, 1)} and the length
  {results.of("OLMo-core", "padded", 1, 1)[1]:.2f}.

Megatron is given a padding mask here; without one it counts padding, too. These are gradients of one step on
made-up activations: what it means for training is another question.
"""


def _cell(error: float, length: float) -> str:
    return "0 (1)" if error < 1e-6 else f"{error:.2f} ({length:.2f})"

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
    return f"""# Gradients of the balance loss in five trainers

Written by `tools/study/balance_gradients.py`. The tables compare one optimizer step on one global batch of 16
sequences from 4 domains, with 2 routers, 16 experts and top 2. The same batch is split over
*ranks × accumulation*. A cell gives the relative L2 error of the gradient at the router weights, compared
with that of E Σ f P over the undivided batch, and in brackets its length over the length of that gradient.
Neighboring sequences share a domain, so micro-batches differ from each other. Differences of convention are
removed: perfect balance gives 1 for all trainers, and the loss is the mean over routers.

Ranks are simulated in one process: sums and means over ranks are arithmetic. moetrain sums gradients over
ranks; the others average them, as DDP and FSDP2 do by default. The rows of moetrain are computed by the
package, and tests show that real ranks give the same, to 1e-10 (`tests/integration/test_balance.py`). The row
of transformers {transformers.__version__} calls its function; the behavior of its Trainer follows
`trainer.py` (`compute_loss`, `training_step`), with `average_tokens_across_devices` on, which is the default.
The other trainers were reimplemented from their formulas and not run:

| | file | commit |
|---|---|---|
{sources}

## Without padding

{results.table("full")}
## Sequences of 4 to 32 tokens, padded to 32

{results.table("padded")}
## All sequences equal

With equal sequences the scope of f does not matter, and only the scale remains.

{results.table("alike")}
{_findings(results)}"""


def _findings(results: Results) -> str:
    """What the tables show."""
    megatron, buffer = "Megatron-LM, `global", "moetrain, `balance.mode=buffer"
    ours = results.worst("global` (default)")
    return f"""\
## Findings

- **moetrain** is exact for every split, with padding too: the largest error is {ours:.1e}.
- **Counts of a micro-batch** (Megatron's `aux_loss`, OLMo-core, XTuner without global average, transformers;
  moetrain with `balance=micro`) optimize something other than the balance of the batch. The error of
  `balance=micro` shows the effect of that scope alone. `sync` (XTuner's default) removes it over ranks only,
  and `buffer` (Megatron's `global_aux_loss`) for the later micro-batches of a step only.
- **Megatron's `global_aux_loss` has 1/ranks of its coefficient**: it is divided by the tokens of all ranks,
  and then gradients are averaged over ranks. Its lengths, in the order of the third table, are
  {results.lengths(megatron)}. In addition, its running counts are divided by the tokens of the
  current micro-batch: with padding, at 1 × 4, the error is {results.error(megatron, "padded", 1, 4)}, while
  `balance.mode=buffer` has {results.error(buffer, "padded", 1, 4)}; without padding both have
  {results.error(megatron, "full", 1, 4)} there.
- **Means of means.** With padding, Megatron's `aux_loss` weights all micro-batches equally, however few
  tokens they have: at 4 × 4 the error is {results.error("Megatron-LM, `aux_loss`", "padded", 4, 4)}; with its
  per-token loss it is {results.error("Megatron-LM, `aux_loss`, per-token", "padded", 4, 4)}, that of
  `balance=micro`. XTuner does the same with accumulation steps:
  {results.error("XTuner, global", "padded", 4, 4)} at 4 × 4, while `balance.mode=sync` has
  {results.error("moetrain, `balance.mode=sync", "padded", 4, 4)}.
- **transformers' Trainer sums the balance loss over ranks and accumulation**, while the cross-entropy is
  divided by the tokens of the whole step, so the coefficient grows with both. Its lengths over that at 1 × 1
  are {results.lengths("transformers")}. At 1 × 1 the error is
  {results.error("transformers", "full", 1, 1)}, because its function adds up the counts of all routers before
  it multiplies, as if experts with the same index in different layers were one.
- **OLMo-core counts padding**: counts and probabilities are not masked, and the sum is divided by the valid
  tokens only. At 1 × 1, where all scopes agree, the error is {results.error("OLMo-core", "padded", 1, 1)} and
  the length {results.of("OLMo-core", "padded", 1, 1)[1]:.2f}.

Megatron gets a padding mask here; without one it counts padding too. These are gradients of one step on
artificial activations. Their effect on training was not studied.
"""


def _cell(error: float, length: float) -> str:
    return "0 (1)" if error < 1e-6 else f"{error:.2f} ({length:.2f})"

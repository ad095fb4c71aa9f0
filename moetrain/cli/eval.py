"""moetrain eval <run> [key=value ...]: held-out loss of a run's newest checkpoint, per domain.

<run> is a name or a directory, as it is or as run.name= or run.dir=; its own config is the base.
eval.windows sets how much text; eval.ngram=3 adds n-gram models up to order 3, trained on the same text and measured on the same
windows.
"""

import math
from typing import Any

from moetrain import launch
from moetrain.config.compose import for_run, run_dir
from moetrain.config.schema import Config
from moetrain.files import nearby, shown
from moetrain.nodes.foreign import check_ranks


def run(argv: list[str]) -> int:
    config = for_run(argv)
    check_ranks("eval", argv, config)
    if not launch.is_worker() and config.run.nproc > 1:
        return launch.start_ranks(["eval", *argv], config.run.nproc, run_dir(config), record=False)
    from moetrain.train.evaluate import evaluate_run

    results, dataset, step = evaluate_run(config)
    if launch.rank() == 0:
        print(f"{nearby(run_dir(config))}, step {step}: at most {config.eval.windows} windows of {config.train.seq_len} tokens "
              f"per domain\n")
        print(table(results, _ngrams(config, dataset)))
    return 0


def table(results: dict[str, float], ngrams: dict[str, list[float]]) -> str:
    """Domains down, their mean last; the n-gram columns are nats per byte like the one beside them."""
    orders = range(max(map(len, ngrams.values()), default=0))
    rows = [["domain", "nats/token", "bits/byte", "nats/byte", *(f"order {order}" for order in orders)]]
    for domain in (name.removeprefix("loss/") for name in results if name.startswith("loss/")):
        nats = results.get(f"nats_per_byte/{domain}", math.nan)
        figures = [results[f"loss/{domain}"], nats / math.log(2), nats, *ngrams.get(domain, [])]
        rows.append([shown(domain), *("-" if math.isnan(figure) else f"{figure:.4f}" for figure in figures)])
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths))) for row in rows)


def _ngrams(config: Config, dataset: Any) -> dict[str, list[float]]:
    """Nats per byte by domain, and for their mean; empty when not asked for."""
    if config.eval.ngram < 0:
        return {}
    from moetrain.data.token_dataset import TokenDataset
    from moetrain.report.ngram import mean_over_domains, witten_bell

    if not isinstance(dataset, TokenDataset):
        print("eval.ngram: generated tokens have no text to count; left out\n")
        return {}
    measured = witten_bell(dataset, windows=config.eval.windows, batch=config.eval.batch, order=config.eval.ngram)
    return {**measured, "mean": mean_over_domains(measured)}

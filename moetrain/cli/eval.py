"""moetrain eval <run> [--json] [key=value ...]: held-out loss of a run's newest checkpoint, per domain.

<run> is a name or a directory, as it is or as run.name= or run.dir=; its own config is the base. It is
evaluated on the text that it held out, as it was prepared. data.path=<file or folder> evaluates on all of
another text and says how much of that was trained on. eval.windows limits the text; eval.ngram=3 adds n-gram
models up to order 3, trained on the same text and evaluated on the same windows. The result is also added to
eval.jsonl; --json prints that line instead of the table. log.routing=true records what experts are chosen for
into log/routing, for moetrain report; on other text beside what the run held out.
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.config.compose import for_run, run_dir, typed_keys
from moetrain.config.schema import Config
from moetrain.errors import DiskError
from moetrain.files import nearby, shown
from moetrain.launch.foreign_ranks import check_ranks
from moetrain.launch.local import start_ranks
from moetrain.launch.program import Program
from moetrain.launch.rank import is_worker, rank
from moetrain.runs.files import JsonlSink

if TYPE_CHECKING:
    from moetrain.train.evaluation.evaluate_run import Evaluated


def run(argv: list[str], program: Program) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    words = [word for word in argv if word != "--json"]
    config = for_run(words)
    check_ranks("eval", words, config)
    if not is_worker() and config.run.nproc > 1:
        return start_ranks(["eval", *argv], config.run.nproc, run_dir(config), record=False,
                           program=program)
    from moetrain.train.evaluation.evaluate_run import evaluate_run, record_of

    found = evaluate_run(config, typed_keys(words), program.convert_model)
    if rank() == 0:
        for change in found.changed:
            print(f"[warn] {change}", file=sys.stderr)
        record = record_of(found)
        if len(words) < len(argv):
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"{heading(found, config)}\n")
            print(table(found.losses, _ngrams(config, found)))
        _keep(found, record, config)
    return 0


def heading(found: "Evaluated", config: Config) -> str:
    """Say which checkpoint was evaluated on which text."""
    text = (f"{nearby(run_dir(config))}, step {found.step}: at most {found.windows:,} windows of "
            f"{config.train.seq_len} tokens per domain")
    if found.typed is None:
        return f"{text} of what it held out (data {found.fingerprint[:12]})"
    if found.overlap is None:
        said = "how much of it was trained on is not known"
    else:
        said = f"{found.overlap.value:.1%} of it also occurs in the text that was trained on"
        if found.overlap.every > 1:
            said += f" (an estimate: {found.overlap.windows:,} places looked up)"
    data = f"{nearby(Path(found.typed))} (data {found.fingerprint[:12]})"
    return f"{text} of {data}, not of what it held out; {said}"


def _keep(found: "Evaluated", record: dict[str, Any], config: Config) -> None:
    """Add the result to eval.jsonl of the run, and its routing; warn where that cannot be written."""
    path = run_dir(config) / "eval.jsonl"
    try:
        JsonlSink(path).write(record)
        if found.routing is not None:
            from moetrain.runs.routing_record import RoutingLog

            path = run_dir(config) / "log" / "routing"
            RoutingLog(path).write(found.routing, None if found.typed is None else found.fingerprint)
    except DiskError as error:
        print(f"[warn] the result is not in {nearby(path)}: {error.why}", file=sys.stderr)


def table(results: dict[str, float], ngrams: dict[str, list[float]]) -> str:
    """Draw a table: one row a domain, their mean last. The n-gram columns are in nats per byte."""
    orders = range(max(map(len, ngrams.values()), default=0))
    rows = [["domain", "nats/token", "bits/byte", "nats/byte", *(f"order {order}" for order in orders)]]
    for domain in (name.removeprefix("loss/") for name in results if name.startswith("loss/")):
        nats = results.get(f"nats_per_byte/{domain}", math.nan)  # absent where tokens have no known bytes
        figures = [results[f"loss/{domain}"], nats / math.log(2), nats, *ngrams.get(domain, [])]
        rows.append([shown(domain), *("-" if math.isnan(figure) else f"{figure:.4f}" for figure in figures)])
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths))) for row in rows)


def _ngrams(config: Config, found: "Evaluated") -> dict[str, list[float]]:
    """Train n-gram models and return nats per byte by domain, of each order; empty unless asked for."""
    if config.eval.ngram < 0:
        return {}
    from moetrain.data.batches.token_dataset import TokenDataset
    from moetrain.report.ngram import mean_over_domains, witten_bell

    dataset = found.dataset
    if found.typed is not None or not isinstance(dataset, TokenDataset):
        why = ("generated tokens have no text to count" if found.typed is None else
               "they are counted on the data that the run held out")
        print(f"eval.ngram: {why}; left out\n")
        return {}
    wanted = config.eval
    measured = witten_bell(dataset, windows=wanted.windows, batch=wanted.batch, order=wanted.ngram)
    return {**measured, "mean": mean_over_domains(measured)}

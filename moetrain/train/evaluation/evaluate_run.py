"""Evaluation of a run's newest checkpoint: `moetrain eval`.

By default the run's own held-out data is measured, from the prepared folder that the checkpoint names. Other
data is measured where the command names it. A text is then measured whole, because none of it is trained on
here, and a split that its folder holds is ignored. Of prepared and indexed tokens only what they hold out is
measured. Text is read with the run's own tokenizer and document mask. data/corpus/overlap.py measures how
much of the text also occurs in the training text, because a loss on text that was trained on means nothing.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple

from moetrain.comm.agreement import all_or_none, on_first
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.schema import Config, DataConfig
from moetrain.config.trained_keys import Changed
from moetrain.config.values import flatten
from moetrain.data.batches.batch import Dataset
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.corpus.overlap import Share, token_overlap
from moetrain.data.tokenizers.tokenizer import Tokenizer, configured_tokenizer
from moetrain.errors import DataError
from moetrain.model.build import ConvertModel
from moetrain.runs.origin import origin_of
from moetrain.runs.routing_record import RoutingRecord, summary
from moetrain.train.data_setup import open_on_ranks, prepare_on_main
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.evaluation.trained import (
    Trained,
    check_tokenizer,
    load_trained,
    no_text,
    open_trained,
    refuse_more_ids,
    trained_dataset,
    trained_tokenizer,
)

# Keys that say where data lies or how it is read, not which data it is.
_BESIDE = ("data.cache", "data.mixture", "data.weights", "data.mask_documents", "data.overlap")
# Most windows of a domain of other data, unless eval.windows is given: all of them are in memory at once.
WINDOWS = 4096
_NAMES = ("data", "data.kind", "data.path", "data.held_out")  # keys that name other data


class Evaluated(NamedTuple):
    """Result of `evaluate_run`."""

    losses: dict[str, float]  # as in Evaluation
    dataset: Dataset
    step: int                 # of the checkpoint
    tokens: int               # that the checkpoint was trained on
    fingerprint: str          # of the data
    typed: str | None         # path of other data; None where the run's own was measured
    overlap: Share | None     # with the training text; None where unknown
    windows: int              # most windows of a domain
    seconds: float
    routing: RoutingRecord | None  # with log.routing
    changed: tuple[Changed, ...]  # keys by which the model is not the one that was trained


def evaluate_run(config: Config, typed: frozenset[str] = frozenset(),
                 convert_model: ConvertModel | None = None) -> Evaluated:
    """Evaluate the newest checkpoint of a run. Collective.

    Args:
        config: the run's config with the command's overrides.
        typed: keys that the overrides set (config/compose.py, typed_keys).
        convert_model: that of the training, if it had one.
    """
    began = time.perf_counter()
    run, name, overlap = load_trained(config, typed, convert_model), None, None
    batch = run.mesh["batch"]
    chosen = all_or_none(batch, lambda: data_keys(run.config, config, typed))
    if chosen <= {"data.tokenizer"}:
        if chosen:
            tokenizer = trained_tokenizer(run)
            all_or_none(batch, lambda: _refuse_other_tokenizer(config.data, tokenizer))
        dataset = trained_dataset(run)
    else:
        dataset, name = _other_dataset(run, config.data, chosen)
        if dataset.fingerprint == run.fingerprint:
            name = None
        else:
            overlap = on_first(batch, lambda: _overlap(run, dataset))
    windows = WINDOWS if name and "eval.windows" not in typed else config.eval.windows
    asked = replace(run.config, eval=replace(config.eval, windows=windows))
    found = evaluate(run.model, dataset, run.mesh, asked, step=run.step, own_domains=name is None)
    return Evaluated(found.losses, dataset, run.step, run.manifest.values["tokens"], dataset.fingerprint,
                     name, overlap, windows, time.perf_counter() - began, found.routing, run.changed)


def record_of(found: Evaluated) -> dict[str, Any]:
    """Record for eval.jsonl. Its key `command` distinguishes it from the records of training."""
    record = {"step": found.step, "tokens": found.tokens, **found.losses, "time/eval": found.seconds,
              "timestamp": time.time(), "command": "eval", "data": found.fingerprint,
              "windows": found.windows}
    if found.typed is not None:
        overlap = found.overlap
        record |= {"path": found.typed, "overlap": overlap and overlap.value,
                   "overlap_windows": overlap.windows if overlap else 0}
    if found.routing is not None:
        record |= summary(found.routing)
    if found.changed:
        record["changed"] = {change.key: [change.trained, change.now] for change in found.changed}
    return record


def data_keys(own: Config, config: Config, typed: frozenset[str]) -> frozenset[str]:
    """Find the keys by which a command asks for other data than the run's own.

    Raises DataError where they contradict each other or name no data.

    Args:
        own: config of the run.
        config: the same with the command's overrides.
        typed: keys that the overrides set.
    """
    before, now = (flatten(with_absolute_paths(one)) for one in (own, config))
    differ = {path for path in now
              if path.startswith("data.") and path not in _BESIDE and now[path] != before[path]}
    chosen = typed & (differ | {"data.tokenizer"})  # the file of a tokenizer may have changed, too
    if "data" in typed and differ.intersection(_NAMES):  # data=<option> sets the whole section
        chosen |= {"data"}
    if {"data.path", "data.held_out"} <= chosen:
        raise DataError(177, "data.path and data.held_out name two texts", where="the command line",
                        why="what is typed is measured whole, and one text at a time",
                        next="leave one of them out")
    if (chosen and config.data.kind != "synthetic" and not chosen.intersection(_NAMES)
            and chosen != {"data.tokenizer"}):
        raise DataError(
            176, f"{', '.join(sorted(chosen))} without data.path", where="the command line",
            why="the run's own held-out text is measured as it was prepared; other text has to be named",
            next=f"data.path=<file or folder of text> {' '.join(f'{key}=…' for key in sorted(chosen))}, "
                 "or leave it out")
    return chosen


def _other_dataset(run: Trained, data: DataConfig, chosen: frozenset[str]) -> tuple[Dataset, str]:
    """Open the data that the command names, and return its name, too.

    Mixture and weights are not read: they concern training only.
    """
    batch, own = run.mesh["batch"], run.config.data
    data = replace(data, mask_documents=own.mask_documents, mixture="proportional", weights={},
                   cache=data.cache or own.cache)
    tokenizer = None
    if data.kind == "text":
        tokenizer = trained_tokenizer(run)
        if tokenizer is None and "data.tokenizer" in chosen and origin_of(run.directory) is not None:
            tokenizer = all_or_none(batch, lambda: configured_tokenizer(data))
        all_or_none(batch, lambda: _refuse_unreadable(run, data, tokenizer, chosen))
        data = measured_whole(data, chosen)
    config = replace(run.config, data=data)
    folder = prepare_on_main(config, run.directory, run.mesh, tokenizer=tokenizer)
    dataset = open_on_ranks(config, run.directory, run.mesh, folder, trains=False)
    all_or_none(batch, lambda: _refuse_other_ids(run, dataset, data))
    return dataset, with_absolute_paths(config).data.path or (
        "the built-in corpus" if data.kind == "text" else data.kind)


def measured_whole(data: DataConfig, chosen: frozenset[str]) -> DataConfig:
    """Config by which a named text is prepared: all of it is held out."""
    path = data.held_out if "data.held_out" in chosen else data.path
    cap = data.domain_cap if "data.domain_cap" in chosen else None
    return replace(data, path=path, held_out=None, held_out_share=1.0, split="merge", domain_cap=cap,
                   overlap=0)


def _refuse_unreadable(run: Trained, data: DataConfig, tokenizer: Tokenizer | None,
                       chosen: frozenset[str]) -> None:
    if tokenizer is None:
        raise no_text(run, "there is no tokenizer to read text with",
                      "data.tokenizer=<its tokenizer.json>" if origin_of(run.directory) is not None else
                      "name data of the same ids: data=tokens data.path=<folder>")
    if "data.tokenizer" in chosen:
        _refuse_other_tokenizer(data, tokenizer)


def _refuse_other_tokenizer(data: DataConfig, tokenizer: Tokenizer | None) -> None:
    check_tokenizer(configured_tokenizer(data), tokenizer.identity if tokenizer else "none", data.tokenizer)


def _refuse_other_ids(run: Trained, dataset: Dataset, data: DataConfig) -> None:
    """Raise DataError where ids have another meaning than in training, or none."""
    where = f"{data.path or data.kind} (data.path)"
    refuse_more_ids(run, dataset.vocab_size, where)
    tokenizer, named = getattr(dataset, "tokenizer", None), run.manifest.facts.get("tokenizer")
    if tokenizer is not None and named is not None:
        check_tokenizer(tokenizer, str(named), where)


def _overlap(run: Trained, dataset: Dataset) -> Share | None:
    """Share of the measured text that was trained on; None where it is unknown or not wanted."""
    limit = run.config.data.overlap
    trained = open_trained(run) if limit else None
    if not isinstance(dataset, TokenDataset) or not isinstance(trained, TokenDataset):
        return None
    as_bytes = trained.tokenizer is not None and trained.tokenizer.identity == "bytes"
    return token_overlap(dataset.heldout_stream, trained.train_stream, as_bytes=as_bytes, limit=limit)

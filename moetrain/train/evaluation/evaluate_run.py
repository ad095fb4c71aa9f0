"""`moetrain eval`: held-out losses of a run's newest checkpoint.

Measured is what the run held out, from the prepared folder that its checkpoint names. Other data is measured where it was typed,
and all of it: nothing of data.path=<text> is trained on, so all of it may be measured, and a split that lies there is not asked for.
Prepared and indexed tokens say themselves what is held out, and only that is measured. The run's own tokenizer reads text, and its
own mask applies. How much of the measured text also occurs in what the run was trained on is counted (data/corpus/overlap.py), because a
loss on text that was trained on means nothing.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple

from moetrain.comm.agreement import all_or_none, on_first
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.schema import Config, DataConfig
from moetrain.config.values import flatten
from moetrain.data.batches.batch import Dataset
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.corpus.overlap import Share, token_overlap
from moetrain.data.tokenizers.tokenizer import Tokenizer, configured_tokenizer
from moetrain.errors import DataError
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

# Keys that say where data lies or how it comes, not what it is.
_BESIDE = ("data.cache", "data.mixture", "data.weights", "data.mask_documents", "data.overlap")
WINDOWS = 4096               # of a domain of typed data at most, unless eval.windows is typed: all are in memory at once
_NAMES = ("data", "data.kind", "data.path", "data.held_out")         # those that name other data


class Evaluated(NamedTuple):
    """losses: as Evaluation. typed: path of the data that was measured in place of the run's own. overlap: None where not known.
    windows: of a domain, at most."""

    losses: dict[str, float]
    dataset: Dataset
    step: int
    tokens: int
    fingerprint: str
    typed: str | None
    overlap: Share | None
    windows: int
    seconds: float


def evaluate_run(config: Config, typed: frozenset[str] = frozenset()) -> Evaluated:
    """Losses of a run's newest checkpoint. Collective; the caller prints.

    typed: the keys that were set on top of the run's own config (config/compose.py, typed_keys).
    """
    began = time.perf_counter()
    run, name, overlap = load_trained(config, typed), None, None
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
    losses = evaluate(run.model, dataset, run.mesh, asked).losses
    return Evaluated(losses, dataset, run.step, run.manifest.values["tokens"], dataset.fingerprint, name, overlap, windows,
                     time.perf_counter() - began)


def record_of(found: Evaluated) -> dict[str, Any]:
    """The line of eval.jsonl. `command` tells it from those that training writes."""
    record = {"step": found.step, "tokens": found.tokens, **found.losses, "time/eval": found.seconds, "timestamp": time.time(),
              "command": "eval", "data": found.fingerprint, "windows": found.windows}
    if found.typed is not None:
        overlap = found.overlap
        record |= {"path": found.typed, "overlap": overlap and overlap.value, "overlap_windows": overlap.windows if overlap else 0}
    return record


def data_keys(own: Config, config: Config, typed: frozenset[str]) -> frozenset[str]:
    """Those of the typed keys that ask for other data than the run's own; DataError where they do not say which."""
    before, now = (flatten(with_absolute_paths(one)) for one in (own, config))
    differ = {path for path in now if path.startswith("data.") and path not in _BESIDE and now[path] != before[path]}
    chosen = typed & (differ | {"data.tokenizer"})                         # whose file may have changed, too
    if "data" in typed and differ.intersection(_NAMES):                    # an option brings its section whole
        chosen |= {"data"}
    if {"data.path", "data.held_out"} <= chosen:
        raise DataError(177, "data.path and data.held_out name two texts", where="the command line",
                        why="what is typed is measured whole, and one text at a time", next="leave one of them out")
    if chosen and config.data.kind != "synthetic" and not chosen.intersection(_NAMES) and chosen != {"data.tokenizer"}:
        raise DataError(176, f"{', '.join(sorted(chosen))} without data.path", where="the command line",
                        why="the run's own held-out text is measured as it was prepared; other text has to be named",
                        next=f"data.path=<file or folder of text> {' '.join(f'{key}=…' for key in sorted(chosen))}, or leave it out")
    return chosen


def _other_dataset(run: Trained, data: DataConfig, chosen: frozenset[str]) -> tuple[Dataset, str]:
    """The data that was typed, and its name. Mixture and weights are of training."""
    batch, own = run.mesh["batch"], run.config.data
    data = replace(data, mask_documents=own.mask_documents, mixture="proportional", weights={}, cache=data.cache or own.cache)
    tokenizer = None
    if data.kind == "text":
        tokenizer = trained_tokenizer(run)
        all_or_none(batch, lambda: _refuse_unreadable(run, data, tokenizer, chosen))
        data = measured_whole(data, chosen)
    config = replace(run.config, data=data)
    folder = prepare_on_main(config, run.directory, run.mesh, tokenizer=tokenizer)
    dataset = open_on_ranks(config, run.directory, run.mesh, folder, trains=False)
    all_or_none(batch, lambda: _refuse_other_ids(run, dataset, data))
    return dataset, with_absolute_paths(config).data.path or ("the built-in corpus" if data.kind == "text" else data.kind)


def measured_whole(data: DataConfig, chosen: frozenset[str]) -> DataConfig:
    """How the text that was typed is prepared: all of it is held out."""
    path = data.held_out if "data.held_out" in chosen else data.path
    cap = data.domain_cap if "data.domain_cap" in chosen else None
    return replace(data, path=path, held_out=None, held_out_share=1.0, split="merge", domain_cap=cap, overlap=0)


def _refuse_unreadable(run: Trained, data: DataConfig, tokenizer: Tokenizer | None, chosen: frozenset[str]) -> None:
    if tokenizer is None:
        raise no_text(run, "there is no tokenizer to read text with", "name data of the same ids: data=tokens data.path=<folder>")
    if "data.tokenizer" in chosen:
        _refuse_other_tokenizer(data, tokenizer)


def _refuse_other_tokenizer(data: DataConfig, tokenizer: Tokenizer | None) -> None:
    check_tokenizer(configured_tokenizer(data), tokenizer.identity if tokenizer else "none", data.tokenizer)


def _refuse_other_ids(run: Trained, dataset: Dataset, data: DataConfig) -> None:
    """DataError where ids mean something else than in training, or nothing at all."""
    where = f"{data.path or data.kind} (data.path)"
    refuse_more_ids(run, dataset.vocab_size, where)
    tokenizer, named = getattr(dataset, "tokenizer", None), run.manifest.facts.get("tokenizer")
    if tokenizer is not None and named is not None:
        check_tokenizer(tokenizer, str(named), where)


def _overlap(run: Trained, dataset: Dataset) -> Share | None:
    """How much of the measured text was trained on; None where the training text is not there, or is not wanted."""
    limit = run.config.data.overlap
    trained = open_trained(run) if limit else None
    if not isinstance(dataset, TokenDataset) or not isinstance(trained, TokenDataset):
        return None
    as_bytes = trained.tokenizer is not None and trained.tokenizer.identity == "bytes"
    return token_overlap(dataset.heldout_stream, trained.train_stream, as_bytes=as_bytes, limit=limit)

"""The frame of all transforms: weights in, a run out, one layer at a time in one process on the CPU.

    rule = Rule("prune", {"keep": 4}, expected="not preserving")
    with open_weights("runs/large") as source:
        done = transform("runs/small", rule, [source], config, pruned_tensors(source), verify=True)
    print(done.verdict)             # max |delta logit| 0.31 (largest logit 7.2), expected: not preserving

A transform says its rule, what the config becomes, and every tensor of the new model; it yields them layer
by layer, so that no more than one layer is in memory. The frame refuses a place where something is, writes
the run beside it, and with it `transform.json`:

    rule        name and arguments
    seed        of its random numbers; null without any
    expected    exact, approximate or not preserving (logits.py)
    sources     path, and digest of the weights, of each
    config      keys that differ: [before, after]
    verified    with verify=True: tokens, max_abs_delta, max_abs_logit

When all of that is on the disk, the run is renamed to its place: it is there whole, or not at all. An exact
rule that turns out not to be is an error, and leaves nothing behind.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moetrain import __version__
from moetrain.config.schema import Config
from moetrain.config.values import flatten
from moetrain.errors import CheckpointError
from moetrain.model.build import ConvertModel
from moetrain.runs.files import as_disk_error, replace_atomically
from moetrain.transform.destination import new_directory
from moetrain.transform.logits import Expected, LogitDifference, Logits, compare_logits, model_logits
from moetrain.transform.reader import WeightsReader, open_weights
from moetrain.transform.writer import Training, write_run

RECORD = "transform.json"


class Source(Protocol):
    """Weights that a transform reads: a WeightsReader, or a folder of a public model."""

    @property
    def directory(self) -> Path: ...

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Rule:
    """What a transform does.

    Attributes:
        name: of the transform.
        arguments: with which it was called, as JSON holds them.
        expected: what becomes of the function that the model computes.
        seed: of its random numbers; None without any.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    expected: Expected = "not preserving"
    seed: int | None = None

    def record(self, sources: Sequence[Source], before: Config | None,
               after: Config | None) -> dict[str, Any]:
        """Return the record of the transform. Call it when the sources have been read: digests need that.

        Args:
            sources: what it has read.
            before: config of the first source, if it has one.
            after: config of the run that was written, if it is one.
        """
        return {"rule": {"name": self.name, **self.arguments}, "seed": self.seed, "expected": self.expected,
                "sources": [{"path": str(source.directory.absolute()), "digest": source.digest}
                            for source in sources],
                "config": config_changes(before, after) if before and after else {},
                "moetrain": __version__, "time": time.time()}


class Transformed(NamedTuple):
    """A run that a transform has written.

    Attributes:
        checkpoint: directory of its checkpoint.
        record: content of transform.json.
        difference: of the logits; None unless they were compared.
    """

    checkpoint: Path
    record: dict[str, Any]
    difference: LogitDifference | None

    @property
    def verdict(self) -> str:
        """The difference in a line, beside what was expected."""
        return verdict(self.difference, self.record["expected"])


def transform(directory: str | Path, rule: Rule, sources: Sequence[Source], config: Config,
              tensors: Iterable[tuple[str, Tensor]], *, vocab_size: int | None = None,
              training: Training | None = None, facts: Mapping[str, Any] | None = None,
              files: Callable[[Path], None] = lambda unfinished: None, verify: bool = False,
              before: Logits | None = None, convert_model: ConvertModel | None = None) -> Transformed:
    """Write the run that a transform makes, whole or not at all.

    Args:
        directory: of the run; nothing is there yet.
        rule: what the transform does.
        sources: weights that it reads. Data and tokenizer are recorded as those of the first, if it is a
            checkpoint of ours.
        config: config of the run.
        tensors: (name, values) of every weight, layer by layer.
        vocab_size: V, rows of embedding and head; those of the first source unless given.
        training: the training that goes on with them; None for weights alone.
        facts: more facts of the manifest.
        files: writes what else belongs to the run, before it is at its place.
        verify: run a batch through the models before and after.
        before: logits of the first source; those of its model unless given.
        convert_model: that of the new model, if it has one.

    Raises:
        ConfigError: something is at the place; or tensors are missing, unknown or of another shape.
        CheckpointError: a source is damaged; or the rule is exact, and the logits differ.
        DiskError: the disk refuses.
    """
    first = sources[0] if sources and isinstance(sources[0], WeightsReader) else None
    place = Path(directory).absolute()
    with new_directory(directory) as unfinished:
        written = write_run(
            unfinished, config, tensors, source=first, vocab_size=vocab_size, training=training,
            facts={**(facts or {}), "transform": {"name": rule.name, **rule.arguments}},
            convert_model=convert_model)
        files(unfinished)
        record = rule.record(sources, None if first is None else first.config, config)
        difference = None
        if verify:
            start = before if before is not None or first is None else model_logits(first, convert_model)
            assert start is not None, "a source without a model of ours needs `before`"
            difference = _compared(written, start, first, rule, place, convert_model)
            record["verified"] = difference._asdict()
        write_record(unfinished, record)
    return Transformed(place / written.relative_to(unfinished), record, difference)


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write transform.json."""
    with as_disk_error(directory), replace_atomically(directory / RECORD) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


def verdict(difference: LogitDifference | None, expected: Expected) -> str:
    """Say in a line how far logits differ, beside what was expected."""
    if difference is None:
        return f"logits not compared, expected: {expected}"
    return (f"max |delta logit| {difference.max_abs_delta:.3g} (largest logit "
            f"{difference.max_abs_logit:.3g}), expected: {expected}")


def config_changes(before: Config, after: Config) -> dict[str, list[Any]]:
    """List the keys by which two configs differ: [before, after]. Those of the run's name are left out."""
    first, second = flatten(before), flatten(after)
    return {key: [first.get(key), second.get(key)] for key in dict.fromkeys([*first, *second])
            if first.get(key) != second.get(key) and key not in ("run.name", "run.dir")}


def _compared(written: Path, before: Logits, first: WeightsReader | None, rule: Rule, place: Path,
              convert_model: ConvertModel | None) -> LogitDifference:
    """Compare the logits of a source with those of the run; CheckpointError where an exact rule is not."""
    with open_weights(written) as reader:
        rows = reader.vocab_size if first is None else min(first.vocab_size, reader.vocab_size)
        found = compare_logits(before, model_logits(reader, convert_model), rows, reader.config.train.seq_len)
    if rule.expected == "exact" and not found.is_exact:
        raise CheckpointError(
            45, f"{rule.name} has changed what the model computes", where=str(place),
            why=f"{verdict(found, rule.expected)}; nothing was left behind",
            next="report it with the config.yaml of the source; verify=false writes the run all the same")
    return found

"""Metadata of checkpoints, and its comparison with the run that resumes from one."""

from collections.abc import Iterator

from moetrain import __version__
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.resumed import resume_conflicts
from moetrain.config.values import as_tree
from moetrain.errors import CheckpointError, DataError
from moetrain.routers.context import routers_of
from moetrain.runs.completion import config_of, last_step
from moetrain.train.checkpoint.load import Resumed
from moetrain.train.optim.lr_schedule import resumed_rate, schedule_warning
from moetrain.train.state import Run


def checkpoint_metadata(run: Run) -> dict[str, object]:
    """Metadata of the run that writes a checkpoint: version, data, order of the data, tokenizer, config."""
    tokenizer = getattr(run.dataset, "tokenizer", None)
    return {"moetrain": __version__, "data": run.dataset.fingerprint, "order": run.dataset.order,
            "tokenizer": tokenizer and tokenizer.identity, "config": as_tree(with_absolute_paths(run.config))}


def check_same_run(run: Run, found: Resumed) -> None:
    """Check that a loaded checkpoint belongs to this run.

    Args:
        run: the run that resumes.
        found: the checkpoint that was loaded.

    Raises:
        CheckpointError: its config differs in a key that a resumed run may not change.
        DataError: its data has another fingerprint.
    """
    conflicts = resume_conflicts(config_of(found.manifest, found.path), run.config)
    if conflicts:
        raise CheckpointError(
            7, "the checkpoint is of another run", where=str(found.path),
            why="; ".join(error.what for error in conflicts[:3]),
            next="take it out of the folder; the same command goes on from the one before")
    trained_on = found.manifest.facts.get("data")
    if trained_on != run.dataset.fingerprint:
        raise DataError(
            62, "the data is not what the run was trained on",
            where=run.config.data.path or "the built-in corpus",
            why=f"its fingerprint is {run.dataset.fingerprint[:12]}, "
                f"the checkpoint's is {str(trained_on)[:12]}",
            next="restore the data, or start another run with run.name",
        )


def start_warnings(run: Run, found: Resumed | None) -> Iterator[str]:
    """Yield warnings about learning rate, routers and order of the data in the remaining steps.

    Args:
        run: the run, after it was resumed.
        found: the checkpoint that was loaded; None for a new run.
    """
    steps, optim, step = run.config.run.steps, run.config.optim, run.state.step + 1
    if warning := schedule_warning(steps, optim):
        yield warning
    if found and step <= last_step(run.config):
        before = config_of(found.manifest, found.path).run.steps
        if changed := resumed_rate(step, before, steps, optim):
            yield changed
        grown = (router.resumed(step, before) for router in routers_of(run.state.model).values())
        yield from dict.fromkeys(note for note in grown if note)
    if found and found.manifest.facts.get("order") != run.dataset.order:
        yield (f"the steps up to {run.state.step} have read the data in the order of another release: "
               "from here on some of it comes again before the rest has come once")

"""Start of an attempt: construction of the run, state of its newest checkpoint, records and banner."""

from collections.abc import Callable
from pathlib import Path

from moetrain.comm.agreement import all_or_none
from moetrain.comm.mesh import Mesh
from moetrain.config.schema import Config
from moetrain.losses.language import LanguageLoss
from moetrain.model.build import ConvertModel
from moetrain.runs.completion import last_step
from moetrain.train.checkpoint.disk_space import check_disk
from moetrain.train.checkpoint.load import resume
from moetrain.train.checkpoint.metadata import check_same_run, start_warnings
from moetrain.train.initial_weights import load_initial_weights
from moetrain.train.loggers.banner import banner_lines
from moetrain.train.loggers.console import Console
from moetrain.train.memory.graph_memory import choose_graphs
from moetrain.train.recorder import Recorder
from moetrain.train.setup import set_up
from moetrain.train.state import Run


def start_run(config: Config, directory: Path, mesh: Mesh, recorder: Recorder, console: Console,
              wrap_engine: Callable[[Run], Run] | None = None,
              convert_model: ConvertModel | None = None,
              language_loss: LanguageLoss | None = None) -> Run:
    """Build a run, resume it from its newest sound checkpoint, and print the banner. Collective.

    A run without a checkpoint begins from the weights of `init.from`, if that is set.

    Args:
        config: the config of the run, with a concrete dtype.
        directory: directory of the run.
        mesh: all ranks.
        recorder: opens the records of the run.
        console: prints the banner and warnings.
        wrap_engine: replaces optimizer and reducer before a checkpoint is read (interop/deepspeed.py).
        convert_model: changes the model before it is sharded (model/build.py).
        language_loss: takes the place of cross-entropy (losses/language.py).

    Returns:
        The run, at the step of its checkpoint, or at step 0.

    Raises:
        CheckpointError: the checkpoint is of another run.
        DataError: the data is not what the checkpoint was trained on.
        DiskError: the disk has no space for the checkpoints to come.
    """
    run = set_up(config, directory, mesh, convert_model, language_loss)
    load_initial_weights(run, convert_model)
    run = wrap_engine(run) if wrap_engine else run  # an engine takes copies of the weights
    found = resume(run.state, directory, mesh, verify=config.checkpoint.verify)
    if found:
        all_or_none(mesh["batch"], lambda: check_same_run(run, found))
    if run.state.step < last_step(config):
        run.graphs = choose_graphs(run)
    check_disk(run.state, directory, mesh, config.checkpoint, last_step(config) - run.state.step)
    resumed = found.path if found else None
    recorder.start(run, resumed)
    console.resume_at(run.state.step)
    console.banner(banner_lines(run, resumed))
    for note in start_warnings(run, found):
        console.line(f"[warn] {note}")
    return run

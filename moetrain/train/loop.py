"""The training loop: set up, resume, step, report, evaluate, save.

    train(config) -> join the ranks -> set_up -> resume -> for each step: train_step, log, evaluate, save

One step is train/step.py. The same command resumes a run (what it may change: runs/completion.py).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from moetrain import __version__
from moetrain.checkpoint.manifest import newest, step_of
from moetrain.comm.agreement import all_or_none
from moetrain.comm.failures import peer_lost, silent_ranks
from moetrain.comm.mesh import Mesh, disconnect
from moetrain.comm.reduce import largest_over
from moetrain.config.build import check_composed
from moetrain.config.compose import resume_conflicts, run_dir
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.schema import Config
from moetrain.errors import CheckpointError, DataError, MoETrainError, PeerError, Preempted
from moetrain.files import nearby
from moetrain.runs.attempts import RunAttempts
from moetrain.runs.completion import config_of, last_step, next_commands
from moetrain.train.banner import banner_lines
from moetrain.train.checkpoint.disk_space import check_disk
from moetrain.train.checkpoint.load import Resumed, resume
from moetrain.train.checkpoint.save import Saved, Saver
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.loggers.console import Console, eval_line
from moetrain.train.loggers.timeline import Timeline
from moetrain.train.memory.graph_memory import choose_graphs
from moetrain.train.memory.out_of_memory import out_of_memory_named
from moetrain.train.optim.lr_schedule import resumed_rate, schedule_warning
from moetrain.train.precision import with_dtype
from moetrain.train.preemption import Preemption, cause, told_early
from moetrain.train.recorder import Recorder
from moetrain.train.setup import Run, check_alone, join, set_up
from moetrain.train.step import Votes, train_step
from moetrain.train.stopwatch import Unsteady
from moetrain.user_code import named_in_traceback


@named_in_traceback()
def train(config: Config, *, wrap_engine: Callable[[Run], Run] | None = None,
          leaving: Callable[[int, str], None] = lambda code, reason: None, again: str = "the same command goes on") -> None:
    """Train to run.steps (or run.stop_at), saving on the way and at the end. Collective over the ranks of the run.

    wrap_engine: hands the run to another engine before a checkpoint is read (interop/deepspeed.py).
    leaving: called with exit code and reason before the process goes without ending in order (train/preemption.py).
    again: what to type to go on with a run that was told to stop.
    """
    check_composed(config)
    check_alone(config)
    directory = run_dir(config)
    mesh = join(config)
    config = with_dtype(config, directory, mesh)
    with Console(rank=mesh.rank, steps=config.run.steps, last=last_step(config), interval=config.log.interval,
                 progress=config.log.progress) as console:
        recorder = Recorder(config, directory, mesh)     # on all ranks: refuses a directory that cannot be written
        with at_work(directory, mesh) as attempt, peers_named(mesh):
            run = set_up(config, directory, mesh)
            run = wrap_engine(run) if wrap_engine else run
            found = resume(run.state, directory, mesh, verify=config.checkpoint.verify)
            resumed = found.path if found else None
            if found:
                all_or_none(mesh["batch"], lambda: same_run(run, found))
            if run.state.step < last_step(config):
                run.graphs = choose_graphs(run)
            check_disk(run.state, directory, mesh, config.checkpoint, last_step(config) - run.state.step)
            recorder.start(run, resumed)
            console.resume_at(run.state.step)
            console.banner(banner_lines(run, resumed))
            for note in start_warnings(run, found):
                console.line(f"[warn] {note}")

            def leave(code: int, reason: str) -> None:
                attempt(code)
                leaving(code, reason)

            try:
                with Preemption(grace_s=config.run.grace_s, leaving=leave) as told, out_of_memory_named(run):
                    if not loop(run, recorder, console, told):
                        disconnect()                     # all ranks leave here, so none tears down what another uses
                        raise Preempted(
                            1, f"told to stop: saved after step {run.state.step} of {last_step(config)}", where=str(directory),
                            why=f"{cause(told.requested) if told.requested else 'another rank'} asked for it", next=again)
            finally:
                recorder.close()
        rows = [("", f"finished at step {run.state.step}: {run.state.tokens:,} tokens"), ("run", nearby(directory))]
        console.summary(rows, next_commands(config))
    disconnect()


def start_warnings(run: Run, found: Resumed | None) -> Iterator[str]:
    """What is unexpected about the learning rate and the order of the steps that are left."""
    steps, optim, step = run.config.run.steps, run.config.optim, run.state.step + 1
    if warning := schedule_warning(steps, optim):
        yield warning
    if found and step <= last_step(run.config):
        before = config_of(found.manifest, found.path).run.steps
        if changed := resumed_rate(step, before, steps, optim):
            yield changed
    if found and found.manifest.facts.get("order") != run.dataset.order:
        yield (f"the steps up to {run.state.step} have read the data in the order of another release: from here on some of it "
               "comes again before the rest has come once")


def loop(run: Run, recorder: Recorder, console: Console, told: Preemption) -> bool:
    """The steps that are left; picture, save and evaluation where they are due. False, saved, once a rank was told to stop.

    What is due at one step is saved before it is evaluated, so that nobody who was told to stop waits for an evaluation.
    """
    config, last = run.config, last_step(run.config)
    saver = Saver(run.directory, run.mesh, config.checkpoint)
    timeline, unsteady = Timeline(run.directory, run.mesh, config.log), Unsteady(run.mesh.device)
    stop = owes_evaluation(run, recorder) and not measure(run, recorder, console, told)
    while run.state.step < last and not stop:
        step = run.state.step + 1
        with timeline.step(step, run.state.model):
            result = train_step(run, step, Votes(told.requested is not None, saver.poll(), saver.overdue()))
        with recorder.pause("save"):
            saved(saver.settle(result.votes.save), recorder, console)
        recorder.step(result)
        if run.dump is not None:
            run.dump.write(step)
        console.step(result.metrics)
        unsteady.add(result.metrics["time/step"])
        if step == last or due(step, config.log.heatmap_every):
            console.heatmap({name: counts.tolist() for name, counts in result.counts.items()})
        stop = result.votes.stop > 0                     # agreed: the same on all ranks
        if stop or step == last:
            break
        if due(step, config.checkpoint.interval) or result.votes.overdue:
            with recorder.pause("save"):
                saved(saver.begin(run.state, facts(run)), recorder, console)
        if due(step, config.eval.interval):
            stop = not measure(run, recorder, console, told)
    saved(saver.finish(), recorder, console)
    saved(saver.begin(run.state, facts(run), final=True), recorder, console)
    if owes_evaluation(run, recorder) and not stop:
        stop = not measure(run, recorder, console, told)
    if stop and (run.state.step < last or owes_evaluation(run, recorder)):
        return False
    recorder.finish()
    return True


def saved(save: Saved | None, recorder: Recorder, console: Console) -> None:
    """Say how a save ended, if one has."""
    if save is None or save.path is None:                # a failed one has been reported (checkpoint/save.py)
        return
    recorder.saved(save)
    console.line(f"[save] step {save.step}: {nearby(save.path)} in {save.seconds:.2f} s, training waited {save.held_s:.2f} s")


@contextmanager
def at_work(directory: Path, mesh: Mesh) -> Iterator[Callable[[int], None]]:
    """The run's directory is ours: locked, this attempt noted, its end too. Yields a function that notes an end."""
    with ExitStack() as stack:
        run_attempts = RunAttempts(directory) if mesh.is_main else None
        end = run_attempts.end if run_attempts else lambda code: None

        def enter() -> None:
            if run_attempts:
                stack.enter_context(told_early())        # the ranks that keep no record may go as they are
                stack.enter_context(run_attempts)
                checkpoint = newest(directory)
                run_attempts.begin(step_of(checkpoint) if checkpoint else 0)

        all_or_none(mesh["batch"], enter)
        try:
            yield end
        except BaseException as error:
            code = error.code if isinstance(error, (MoETrainError, SystemExit)) else 1
            end(130 if isinstance(error, KeyboardInterrupt) else code)
            raise
        end(0)


@contextmanager
def peers_named(mesh: Mesh) -> Iterator[None]:
    """A collective that failed because a rank is gone, or did not answer in time, becomes a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if not peer_lost(error):
            raise
        silent = silent_ranks(error)
        who = f"rank {silent}, which does not answer" if silent else "a rank that is gone or does not answer"
        raise PeerError(1, f"rank {mesh.rank} waited for {who}", where="a collective", why=str(error).splitlines()[0],
                        next="see log/rank-<n>.log of the others for the first failure; the same command resumes") from error


def owes_evaluation(run: Run, recorder: Recorder) -> bool:
    """Whether this step is to be evaluated and has not been: an attempt that was told to stop saves first. Collective."""
    step = run.state.step
    wanted = due(step, run.config.eval.interval) or step == last_step(run.config)
    return wanted and bool(largest_over(run.mesh["batch"], recorder.owes_evaluation(step)))


def measure(run: Run, recorder: Recorder, console: Console, told: Preemption) -> bool:
    """Evaluate per domain; to eval.jsonl and the screen. False when a rank was told to stop meanwhile: nothing is kept."""
    began = time.perf_counter()
    with recorder.pause("eval"):
        found = evaluate(run.state.model, run.dataset, run.mesh, run.config, stop=lambda: told.requested is not None)
    if found is None:
        return False
    recorder.evaluation(run, found, time.perf_counter() - began)
    console.line(eval_line(run.state.step, found.losses))
    return True


def facts(run: Run) -> dict[str, object]:
    """What a checkpoint says of the run that wrote it."""
    tokenizer = getattr(run.dataset, "tokenizer", None)
    return {"moetrain": __version__, "data": run.dataset.fingerprint, "order": run.dataset.order, "tokenizer": tokenizer and tokenizer.identity,
            "config": asdict(with_absolute_paths(run.config))}


def due(step: int, interval: int) -> bool:
    return interval > 0 and step > 0 and step % interval == 0


def same_run(run: Run, found: Resumed) -> None:
    """CheckpointError where the checkpoint is another run's, DataError where the data is not what it was trained on."""
    conflicts = resume_conflicts(config_of(found.manifest, found.path), run.config)
    if conflicts:
        raise CheckpointError(
            7, "the checkpoint is of another run", where=str(found.path), why="; ".join(error.what for error in conflicts[:3]),
            next="take it out of the folder; the same command goes on from the one before")
    trained_on = found.manifest.facts.get("data")
    if trained_on != run.dataset.fingerprint:
        raise DataError(
            62, "the data is not what the run was trained on", where=run.config.data.path or "the built-in corpus",
            why=f"its fingerprint is {run.dataset.fingerprint[:12]}, the checkpoint's is {str(trained_on)[:12]}",
            next="restore the data, or start another run with run.name",
        )

"""The training loop: join the ranks, start or resume the run, then step, save and evaluate.

    train         session.py: rank, lock, signals -> start.py: set up, resume -> train_loop
    train_loop    for each step: train_step (step.py), record; save and evaluate where they are due

The same command resumes a run; runs/completion.py says what it may change.
"""

from collections.abc import Callable

from moetrain.comm.mesh import disconnect
from moetrain.config.schema import Config
from moetrain.files import nearby
from moetrain.losses.language import LanguageLoss
from moetrain.model.build import ConvertModel
from moetrain.runs.completion import last_step, next_commands
from moetrain.train.checkpoint.periodic import PeriodicSaves
from moetrain.train.evaluation.periodic import PeriodicEvaluation, is_due
from moetrain.train.loggers.console import Console
from moetrain.train.loggers.stopwatch import Unsteady
from moetrain.train.loggers.timeline import Timeline
from moetrain.train.preemption import Preemption
from moetrain.train.recorder import Recorder
from moetrain.train.session import join_run, session
from moetrain.train.start import start_run
from moetrain.train.state import Run
from moetrain.train.step import StepFlags, train_step
from moetrain.user_code import named_in_traceback


@named_in_traceback()
def train(config: Config, *, convert_model: ConvertModel | None = None,
          language_loss: LanguageLoss | None = None,
          wrap_engine: Callable[[Run], Run] | None = None,
          on_exit: Callable[[int, str], None] = lambda code, reason: None,
          again: str = "the same command goes on") -> None:
    """Train to `run.steps` (or `run.stop_at`), saving on the way and at the end. Collective.

    All ranks of the run call it. A run that exists is resumed from its newest sound checkpoint.

    Args:
        config: composed and checked (config/compose.py).
        convert_model: changes the model before it is sharded: other layers, adapters, frozen parameters.
            Every rank and every attempt of the run is given the same one.
        language_loss: takes the place of cross-entropy (losses/language.py), for every rank and attempt.
        wrap_engine: replaces optimizer and reducer by those of another engine, before a checkpoint is read
            (interop/deepspeed.py).
        on_exit: called with exit code and reason before a process exits at once, without unwinding
            (preemption.py).
        again: how to resume the run; shown when a signal has stopped it.

    Raises:
        Preempted: a signal stopped the run before its last step. The run is saved.
    """
    config, directory, mesh = join_run(config, convert_model)
    with Console(rank=mesh.rank, steps=config.run.steps, last=last_step(config), interval=config.log.interval,
                 progress=config.log.progress) as console:
        recorder = Recorder(config, directory, mesh)     # collective: checks that rank 0 can write there
        with session(directory, mesh, on_exit) as attempt:
            run = start_run(config, directory, mesh, recorder, console, wrap_engine, convert_model,
                            language_loss)
            try:
                with attempt.training(run) as preemption:
                    if not train_loop(run, recorder, console, preemption):
                        raise attempt.preempted(run, preemption.requested, again)
            finally:
                recorder.close()
        rows = [("", f"finished at step {run.state.step}: {run.state.tokens:,} tokens"),
                ("run", nearby(directory))]
        console.summary(rows, next_commands(config))
    disconnect()


def train_loop(run: Run, recorder: Recorder, console: Console, preemption: Preemption) -> bool:
    """Run the remaining steps, with the saves and evaluations that are due between them. Collective.

    Where both are due, the save comes first. After a stop signal the run is saved without an evaluation; if
    one was due at that step, the next attempt begins with it.

    Args:
        run: the run, at any step; its state changes.
        recorder: writes the records of the run.
        console: writes to the screen.
        preemption: knows whether this rank has received a stop signal.

    Returns:
        True if the run is complete; False if a rank received a stop signal before that. The run is saved in
        both cases.
    """
    config, last = run.config, last_step(run.config)
    saves, evaluation = (PeriodicSaves(run, recorder, console),
                         PeriodicEvaluation(run, recorder, console, preemption))
    timeline, unsteady = Timeline(run.directory, run.mesh, config.log), Unsteady(run.mesh.device)
    stop = evaluation.owed() and not evaluation.evaluate()
    while run.state.step < last and not stop:
        step = run.state.step + 1
        save_done, save_failed = saves.saver.poll()
        flags = StepFlags(stop=int(preemption.requested is not None), save_done=save_done,
                          save_failed=save_failed, save_overdue=saves.saver.overdue())
        with timeline.step(step, run.state.model):
            result = train_step(run, step, flags)
        saves.settle(result.flags.save)
        recorder.step(result)
        if run.dump is not None:
            run.dump.write(step)
        console.step(result.metrics)
        unsteady.add(result.metrics["time/step"])
        if step == last or is_due(step, config.log.heatmap_every):
            experts = run.state.model.num_experts
            console.heatmap({name: counts[:experts[name]].tolist() for name, counts in result.counts.items()})
        stop = result.flags.stop > 0                     # summed over ranks: the same everywhere
        if stop or step == last:
            break
        if is_due(step, config.checkpoint.interval) or result.flags.save_overdue:
            saves.begin()
        if is_due(step, config.eval.interval):
            stop = not evaluation.evaluate()
    saves.finish()
    if evaluation.owed() and not stop:
        stop = not evaluation.evaluate()
    if stop and (run.state.step < last or evaluation.owed()):
        return False
    recorder.finish()
    return True

"""The evaluations of a run: which step is owed one, and its report."""

import time

from moetrain.comm.reduce import largest_over
from moetrain.runs.completion import last_step
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.loggers.console import Console, eval_line
from moetrain.train.preemption import Preemption
from moetrain.train.recorder import Recorder
from moetrain.train.state import Run


class PeriodicEvaluation:
    """Evaluation per domain at the steps of `eval.interval` and at the last one.

    Time in it counts as a pause of training.
    """

    def __init__(self, run: Run, recorder: Recorder, console: Console, preemption: Preemption) -> None:
        self.run, self.recorder, self.console, self.preemption = run, recorder, console, preemption

    def owed(self) -> bool:
        """Whether this step is to be evaluated and has not been:

        an attempt that was told to stop saves first. Collective.
        """
        step = self.run.state.step
        wanted = is_due(step, self.run.config.eval.interval) or step == last_step(self.run.config)
        return wanted and bool(largest_over(self.run.mesh["batch"], self.recorder.owes_evaluation(step)))

    def evaluate(self) -> bool:
        """Evaluate, to eval.jsonl and the screen.

        False if a rank was told to stop meanwhile; then nothing is kept.
        """
        run, began = self.run, time.perf_counter()
        with self.recorder.pause("eval"):
            found = evaluate(run.state.model, run.dataset, run.mesh, run.config,
                             stop=lambda: self.preemption.requested is not None)
        if found is None:
            return False
        self.recorder.evaluation(run, found, time.perf_counter() - began)
        self.console.line(eval_line(run.state.step, found.losses))
        return True


def is_due(step: int, interval: int) -> bool:
    """Whether something is due every `interval` steps, at this one. 0: never."""
    return interval > 0 and step > 0 and step % interval == 0

"""Evaluations of a run during training: which steps need one, and its report to records and screen."""

import time

from moetrain.comm.reduce import largest_over
from moetrain.runs.completion import last_step
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.loggers.console import Console, eval_line
from moetrain.train.preemption import Preemption
from moetrain.train.recorder import Recorder
from moetrain.train.state import Run


class PeriodicEvaluation:
    """Evaluation by domain every `eval.interval` steps and at the last step.

    Its time is recorded as a pause of training.

    Args:
        run: the run to evaluate.
        recorder: takes a record of each evaluation, and knows which steps have one.
        console: prints a line for each evaluation.
        preemption: a stop signal ends an evaluation.
    """

    def __init__(self, run: Run, recorder: Recorder, console: Console, preemption: Preemption) -> None:
        self.run, self.recorder, self.console, self.preemption = run, recorder, console, preemption

    def owed(self) -> bool:
        """Whether the current step should be evaluated and has no evaluation on record. Collective.

        This is so after an attempt that was preempted between the save and the evaluation of its last step.
        """
        step = self.run.state.step
        wanted = is_due(step, self.run.config.eval.interval) or step == last_step(self.run.config)
        return wanted and bool(largest_over(self.run.mesh["batch"], self.recorder.owes_evaluation(step)))

    def evaluate(self) -> bool:
        """Evaluate the current step and report the result. Collective.

        Returns:
            False if a rank received a stop signal meanwhile; the evaluation is then discarded.
        """
        run, began = self.run, time.perf_counter()
        with self.recorder.pause("eval"):
            found = evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step,
                             stop=lambda: self.preemption.requested is not None)
        if found is None:
            return False
        self.recorder.evaluation(run, found, time.perf_counter() - began)
        self.console.line(eval_line(run.state.step, found.losses))
        return True


def is_due(step: int, interval: int) -> bool:
    """Whether a step is a multiple of `interval`, from the first on. An interval of 0 means never."""
    return interval > 0 and step > 0 and step % interval == 0

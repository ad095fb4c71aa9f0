"""Saves of a run, with their reports to records and screen. The loop decides when a save is due."""

from moetrain.files import nearby
from moetrain.train.checkpoint.metadata import checkpoint_metadata
from moetrain.train.checkpoint.save import Saved, SaveFlags, Saver
from moetrain.train.loggers.console import Console
from moetrain.train.recorder import Recorder
from moetrain.train.state import Run


class PeriodicSaves:
    """Saver of a run that reports finished saves. Time spent in it is recorded as a pause of training.

    Args:
        run: the run to save.
        recorder: takes a record of each checkpoint.
        console: prints a line for each checkpoint.
    """

    def __init__(self, run: Run, recorder: Recorder, console: Console) -> None:
        self.run, self.recorder, self.console = run, recorder, console
        self.saver = Saver(run.directory, run.mesh, run.config.checkpoint)

    def settle(self, summed: SaveFlags) -> None:
        """Advance the save under way by the flags of `Saver.poll`, summed over all ranks."""
        with self.recorder.pause("save"):
            self._report(self.saver.settle(summed))

    def begin(self) -> None:
        """Start a save of the current step. Waits for an earlier save that is still under way."""
        with self.recorder.pause("save"):
            self._report(self.saver.begin(self.run.state, checkpoint_metadata(self.run)))

    def finish(self) -> None:
        """Complete the save under way, then save the current step and wait for the disk. Collective."""
        self._report(self.saver.finish())
        self._report(self.saver.begin(self.run.state, checkpoint_metadata(self.run), final=True))

    def _report(self, save: Saved | None) -> None:
        if save is None or save.path is None:            # save.py has logged the failure
            return
        self.recorder.saved(save)
        self.console.line(f"[save] step {save.step}: {nearby(save.path)} in {save.seconds:.2f} s, "
                          f"training waited {save.held_s:.2f} s")

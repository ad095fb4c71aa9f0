"""The saves of a run: started where they are due, reported when they end."""

from moetrain.files import nearby
from moetrain.train.checkpoint.metadata import checkpoint_metadata
from moetrain.train.checkpoint.save import Saved, SaveFlags, Saver
from moetrain.train.loggers.console import Console
from moetrain.train.recorder import Recorder
from moetrain.train.state import Run


class PeriodicSaves:
    """A saver with its reports to the records and the screen. Time in it counts as a pause of training."""

    def __init__(self, run: Run, recorder: Recorder, console: Console) -> None:
        self.run, self.recorder, self.console = run, recorder, console
        self.saver = Saver(run.directory, run.mesh, run.config.checkpoint)

    def settle(self, summed: SaveFlags) -> None:
        """Go on with the save under way. summed: the flags of all ranks (`Saver.poll`)."""
        with self.recorder.pause("save"):
            self._report(self.saver.settle(summed))

    def begin(self) -> None:
        """Start a save of this step."""
        with self.recorder.pause("save"):
            self._report(self.saver.begin(self.run.state, checkpoint_metadata(self.run)))

    def finish(self) -> None:
        """Complete the save under way, then save the last step. Collective; waits for the disk."""
        self._report(self.saver.finish())
        self._report(self.saver.begin(self.run.state, checkpoint_metadata(self.run), final=True))

    def _report(self, save: Saved | None) -> None:
        if save is None or save.path is None:            # save.py has reported one that failed
            return
        self.recorder.saved(save)
        self.console.line(f"[save] step {save.step}: {nearby(save.path)} in {save.seconds:.2f} s, "
                          f"training waited {save.held_s:.2f} s")

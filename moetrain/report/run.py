"""All pictures of a run, into <run.dir>/report."""

from pathlib import Path

from moetrain.report.loads import draw_loads
from moetrain.report.output import unwritable
from moetrain.report.specialisation import draw_specialisation
from moetrain.train.sinks import LoadsLog


def draw(run_dir: Path) -> None:
    """Tokens per expert; experts by domain, where the run has been evaluated on two domains or more."""
    log = LoadsLog(run_dir / "log" / "loads")
    try:
        if not log.is_built(run_dir / "loads.npz"):          # the run was stopped, or goes on
            log.write_npz(run_dir / "loads.npz")
    except OSError as error:
        raise unwritable(run_dir / "loads.npz", error) from error
    draw_loads(run_dir)
    if (run_dir / "specialisation.npz").exists():
        draw_specialisation(run_dir)

"""All pictures of a run, into <run.dir>/report."""

from pathlib import Path

from moetrain.report.loads import draw_loads
from moetrain.report.specialisation import draw_specialisation


def draw(run_dir: Path) -> None:
    """Tokens per expert; experts by domain, where the run has been evaluated on two domains or more."""
    draw_loads(run_dir)
    if (run_dir / "specialisation.npz").exists():
        draw_specialisation(run_dir)

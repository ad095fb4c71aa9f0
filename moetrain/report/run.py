"""Draw all pictures of a run into <run.dir>/report."""

from pathlib import Path

from moetrain.report.loads import draw_loads
from moetrain.report.loss import draw_loss
from moetrain.report.output import unwritable
from moetrain.report.routing_pictures import draw_routing
from moetrain.report.specialization import draw_specialization
from moetrain.runs.expert_loads import LoadsLog


def draw(run_dir: Path) -> list[Path]:
    """Draw the loss, the expert loads, the experts by domain and the routing, as far as they are recorded.

    Experts by domain need an evaluation on two domains or more, the routing needs log.routing. Returns the
    paths of the pictures. Raises DataError where the run has recorded nothing that can be drawn.
    """
    drawn = [path for path in [draw_loss(run_dir)] if path]
    recorded, built = run_dir / "log" / "loads", run_dir / "loads.npz"
    if recorded.exists() or built.exists() or not drawn:  # a model without routers has neither
        drawn.append(_draw_loads(LoadsLog(recorded), run_dir, built))
    if (run_dir / "specialisation.npz").exists():
        drawn.append(draw_specialization(run_dir))
    return [*drawn, *draw_routing(run_dir)]


def _draw_loads(log: LoadsLog, run_dir: Path, built: Path) -> Path:
    try:
        if not log.is_built(built):  # the run was stopped, or is still training
            log.write_npz(built)
    except OSError as error:
        raise unwritable(built, error) from error
    return draw_loads(run_dir)

"""Picture of the specialization of experts by domain: `<run.dir>/report/specialisation.png`.

It shows the last evaluation, from specialisation.npz. Each router has a panel with a row for each domain
and a column for each expert, sorted by the domain that it serves most. A cell is the share of an expert in
the choices of a domain over its mean share in all domains: 1 where the domain makes no difference, gray
where no domain chose the expert.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.errors import DataError
from moetrain.report.arrays import Form, read_arrays
from moetrain.report.loads import COLOR_MAP, GRAY
from moetrain.report.output import Lettering, report_file
from moetrain.runs.specialization import mutual_information

OCTAVES = 2.0    # the color scale ends at 4 times the mean share, and at a quarter of it
MAX_ROUTERS = 8  # routers drawn, evenly spaced over the layers


class Specialization(NamedTuple):
    """Routing choices of an evaluation, by domain."""

    choices: dict[str, np.ndarray]  # int64 [M, E] for each router
    domains: list[str]
    step: int


FORMS = {"choices": Form("integers", ("domains", "routers", "experts of the largest router")),
         "domains": Form("text", ("domains",)), "routers": Form("text", ("routers",)),
         "experts": Form("integers", ("routers",)), "step": Form("integers", ())}


def read_specialization(path: Path) -> Specialization:
    """Read specialisation.npz; DataError where it is damaged."""
    try:
        arrays = read_arrays(path, FORMS)
        choices, experts = arrays["choices"], arrays["experts"]
        if not choices.size or choices.min() < 0:
            raise ValueError("there are no choices in it, or negative ones")
        if experts.min() < 1 or experts.max() > choices.shape[-1]:
            raise ValueError("a router has no experts, or more than there is room for")
    except ValueError as error:
        raise DataError(63, "experts by domain cannot be read", where=str(path), why=str(error),
                        next="move it away: it is written at every evaluation on two domains or more"
                        ) from error
    return Specialization(
        {str(name): choices[:, index, :experts[index]] for index, name in enumerate(arrays["routers"])},
        [str(name) for name in arrays["domains"]], int(arrays["step"]))


def draw_specialization(run_dir: Path) -> Path:
    """Draw the picture and return its path."""
    found = read_specialization(Path(run_dir) / "specialisation.npz")
    path = Path(run_dir) / "report" / "specialisation.png"
    _draw(found, path)
    return path


def lift(choices_ME: np.ndarray) -> np.ndarray:
    """Share of every expert in a domain over its mean share, [M, E]; NaN where no domain chose the expert."""
    shares_ME = choices_ME / np.maximum(choices_ME.sum(1, keepdims=True), 1)
    mean_E = shares_ME.mean(0)
    return np.divide(shares_ME, mean_E, out=np.full_like(shares_ME, np.nan), where=mean_E > 0)


def headline(found: Specialization) -> str:
    """Sum up the picture in a line."""
    nats = {name: mutual_information(choices_ME) for name, choices_ME in found.choices.items()}
    most = max(nats, key=lambda name: nats[name])
    share = nats[most] / np.log(max(2, len(found.domains)))
    return (f"A choice tells {share:.0%} of what there is to know of its domain in {most}; "
            f"{np.mean(list(nats.values())):.2f} nats on average")


def _draw(found: Specialization, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(found.choices)
    shown = [names[i] for i in np.unique(
        np.linspace(0, len(names) - 1, min(MAX_ROUTERS, len(names))).round().astype(int))]
    height = 0.28 * len(found.domains) + 0.75
    with Lettering([*found.domains, *names]) as lettering:
        figure = Figure(figsize=(11, 1.0 + height * len(shown)), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(headline(found), fontsize=13, fontweight="bold", x=0.01, ha="left")
        panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for panel, name in zip(panels, shown):
            image = _panel(panel, found.choices[name], [lettering(domain) for domain in found.domains])
            panel.set_title(f"{lettering(name)}, {mutual_information(found.choices[name]):.2f} nats",
                            loc="left", fontsize=10)
        any_unused = any((found.choices[name].sum(0) == 0).any() for name in shown)
        panels[-1].set_xlabel("experts, sorted by the domain that they serve most"
                              + "; grey: chosen by no domain" * any_unused)
        bar = figure.colorbar(image, ax=list(panels), extend="both", pad=0.015, aspect=30)
        bar.set_label("share in the domain / mean over domains")
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
        with report_file(path) as file:
            figure.savefig(file, format="png")


def _panel(axes: Any, choices_ME: np.ndarray, domains: list[str]) -> Any:
    ratio_ME = lift(choices_ME)
    order_E = sorted(range(ratio_ME.shape[1]), key=lambda e: (
        int(np.nan_to_num(ratio_ME[:, e]).argmax()), -float(np.nan_to_num(ratio_ME[:, e]).max()), e))
    with np.errstate(divide="ignore"):
        # The share is 0 in a domain that never chose the expert: clip it to below the scale.
        octaves = np.log2(ratio_ME[:, order_E]).clip(-2 * OCTAVES)
    axes.set_facecolor(GRAY)
    image = axes.pcolormesh(np.ma.masked_array(octaves, np.isnan(octaves)), cmap=COLOR_MAP,
                            vmin=-OCTAVES, vmax=OCTAVES, edgecolors="white", linewidth=0.4)
    axes.set(ylim=(len(domains), 0))
    axes.set_yticks(np.arange(len(domains)) + 0.5, labels=domains)
    step = max(1, len(order_E) // 32)
    axes.set_xticks(np.arange(0, len(order_E), step) + 0.5, labels=[str(e) for e in order_E[::step]],
                    fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image

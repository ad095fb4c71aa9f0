"""Pictures of routing from records, and records that are refused."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from moetrain.errors import DataError
from moetrain.report.routing import (
    churn_between,
    drop_rates,
    entropies,
    layer_information,
    read_evaluations,
    read_record,
)
from moetrain.report.routing_pictures import draw_routing
from moetrain.runs.routing_record import RoutingLog
from tests.support.routing_records import random_record


def recorded(directory: Path, steps: list[int], **changes: object) -> Path:
    log = RoutingLog(directory / "log" / "routing")
    for step in steps:
        log.write(random_record(step, **changes))
    return directory


def test_every_picture_is_drawn_with_its_values(tmp_path: Path) -> None:
    recorded(tmp_path, [5, 10, 15])
    RoutingLog(tmp_path / "log" / "routing").write(random_record(15, seed=1), "0123456789abcdef")
    drawn = draw_routing(tmp_path)
    assert [path.stem.removeprefix("routing_") for path in drawn] == [
        "information", "churn", "layers", "entropy", "experts", "drops"]
    for path in drawn:
        assert imread(path).shape[1] == 11 * 120 and imread(path)[..., :3].std() > 0.05
    rows = [row.split(",") for row in (tmp_path / "report" / "routing.csv").read_text().splitlines()[1:]]
    assert {row[0] for row in rows} == {"information", "churn", "layers", "entropy", "experts", "drops"}
    assert any("other data 0123456789ab" in row[3] for row in rows if row[0] == "drops")


def test_one_evaluation_of_one_router_is_drawn_and_drops_only_where_there_are_any(
        tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert len(draw_routing(recorded(tmp_path, [1], experts=(128,), drops=False))) == 5 and not recwarn.list


def test_churn_of_one_evaluation_keeps_the_width_of_its_panels(tmp_path: Path) -> None:
    """A legend without lines made the constrained layout shrink them."""
    draw_routing(recorded(tmp_path, [1]))
    ink = imread(tmp_path / "report" / "routing_churn.png")[..., :3].mean(-1)
    axis = (ink < 0.5).sum(1).max()  # the row of pixels of the lower spines
    assert axis > ink.shape[1] // 2


def test_a_run_without_records_has_no_pictures(tmp_path: Path) -> None:
    assert draw_routing(tmp_path) == [] and read_evaluations(tmp_path) is None


def test_values_are_those_of_the_records(tmp_path: Path) -> None:
    found = read_evaluations(recorded(tmp_path, [5, 10]) / "log" / "routing")
    steps, shares, flips = churn_between(found)
    assert steps.tolist() == [10] and shares.shape == flips.shape == (1, 2)
    assert (np.isnan(layer_information(found.last)) == [[True, False], [True, True]]).all()
    last = found.last
    assert entropies(found)["held-out text"][1] == pytest.approx(last.entropy[0, 1] / 60 / np.log(3))
    assert drop_rates(found)["held-out text"][-1] == last.dropped[0, 0, -1] / last.chosen[0, 0, -1]


@pytest.mark.parametrize("form", [
    {"ids": None}, {"ids": np.zeros((2, 5, 9), int)}, {"positions": np.full((2, 6, 4), -1)},
    {"experts": np.array([4, 5])}, {"entropy": np.full((2, 2), np.nan)}, {"chosen": np.ones((2, 2, 9), int)},
    {"routers": np.array(["one"])}, {"step": np.array([1])},
], ids=lambda form: next(iter(form)))
def test_arrays_of_another_form_are_refused(tmp_path: Path, form: dict[str, object]) -> None:
    path = tmp_path / "step-00000001.npz"
    arrays = random_record(1)._asdict() | form
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match="E-DATA-064") as refused:
        read_record(path)
    assert refused.value.code == 12

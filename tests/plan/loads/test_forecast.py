"""Forecasts of loads, and the family of loads that planners are compared on."""

import numpy as np
import pytest
import torch

from moetrain.plan.loads.forecast import LoadForecaster, MeanForecast, TrendForecast, misplaced_permille
from moetrain.plan.loads.synthetic import BURST_PERIOD, BURST_STEPS, NAMES, ROTATION_STEPS, generate

FORECASTS = [lambda size: MeanForecast(size), lambda size: MeanForecast(size, window=1),
             lambda size: TrendForecast(size),
             lambda size: TrendForecast(size, 0.3, 0.0)]
IDS = ["mean", "last", "trend", "average"]


def test_the_mean_is_over_the_window_and_rounded():
    forecast = MeanForecast(2, window=3)
    for loads in ([100, 0], [1, 2], [2, 2], [2, 3]):
        forecast.observe(torch.tensor(loads))
    assert forecast.expected().tolist() == [2, 2]                   # 5/3 and 7/3
    assert forecast.last().tolist() == [2, 3] and forecast.expected().dtype == torch.int64


def test_the_mean_counts_the_steps_there_were():
    forecast = MeanForecast(1, window=5)
    for load, mean in ((10, 10), (20, 15)):
        forecast.observe(torch.tensor([load]))
        assert forecast.expected().tolist() == [mean]


def test_a_trend_runs_ahead_of_a_mean_and_never_below_nothing():
    trend, mean = TrendForecast(2, level=0.5, trend=0.5), MeanForecast(2)
    for step in range(20):
        for forecast in (trend, mean):
            forecast.observe(torch.tensor([100 * step, 2000 - 200 * step if step < 10 else 0]))
    assert abs(int(trend.expected()[0]) - 2000) < 60 < 2000 - int(mean.expected()[0])
    assert int(trend.expected().min()) >= 0


def test_a_level_alone_is_an_exponential_average():
    forecast = TrendForecast(1, level=0.25, trend=0.0)
    for load in (1000, 0, 0):
        forecast.observe(torch.tensor([load]))
    assert forecast.expected().tolist() == [563]                    # 1000 * 0.75 ** 2 = 562.5


@pytest.mark.parametrize("make", FORECASTS, ids=IDS)
def test_loads_that_stay_are_expected_exactly(make):
    forecast = make(3)
    assert not forecast.expected().any() and not forecast.last().any()
    for _ in range(7):
        forecast.observe(torch.tensor([7, 0, 123456789012]))
    assert forecast.expected().tolist() == forecast.last().tolist() == [7, 0, 123456789012]


def seen(name: str, steps: int) -> torch.Tensor:
    return torch.from_numpy(generate(name, 0, steps, 2, 8, 1000).sum(1))


def resumed(forecaster: LoadForecaster, again: LoadForecaster) -> LoadForecaster:
    for name, table in again.tables().items():
        table.copy_(forecaster.tables()[name])
    return again


@pytest.mark.parametrize("make", FORECASTS, ids=IDS)
def test_a_resumed_forecaster_goes_on_as_if_nothing_had_happened(make):
    def fresh() -> LoadForecaster:
        return LoadForecaster(make(8), {"a": 3, "b": 5}, 150)

    whole, again, fell_back = fresh(), fresh(), 0
    for at, loads_L in enumerate(seen("lognormal_1", 12)):
        for forecaster in (whole, again):
            forecaster.observe(loads_L)
        fell_back += int((whole.errors_r > 150).sum())
        again = resumed(again, fresh()) if at in (0, 1, 6, 9) else again
        for name, loads in whole.loads().items():
            assert again.loads()[name].tolist() == loads.tolist()
    assert fell_back


def test_what_was_observed_may_be_written_over():
    forecast, loads_L = MeanForecast(2), torch.tensor([4, 4])
    forecast.observe(loads_L)
    loads_L[:] = 9
    assert forecast.expected().tolist() == [4, 4]


def test_a_layer_falls_back_to_the_last_step_where_its_own_forecast_erred():
    forecaster = LoadForecaster(MeanForecast(4), {"a": 2, "b": 2}, 200)
    for loads in ([10, 10, 10, 10], [10, 10, 0, 20]):
        forecaster.observe(torch.tensor(loads))
    assert forecaster.errors_r.tolist() == [0, 500]
    loads = forecaster.loads()
    assert loads["a"].tolist() == [10, 10] and loads["b"].tolist() == [0, 20] and len(loads) == 2
    for _ in range(3):                                             # what lasted long enough is forecast again
        forecaster.observe(torch.tensor([10, 10, 0, 20]))
    assert forecaster.errors_r.tolist() == [0, 142] and forecaster.loads()["b"].tolist() == [2, 18]


def test_a_forecaster_that_never_falls_back_keeps_to_its_forecast():
    forecaster = LoadForecaster(MeanForecast(2), {"a": 2}, 1000)
    for loads in ([10, 0], [0, 10]):
        forecaster.observe(torch.tensor(loads))
    assert forecaster.errors_r.tolist() == [1000] and forecaster.loads()["a"].tolist() == [5, 5]


def test_there_is_no_error_before_there_was_a_forecast():
    forecaster = LoadForecaster(TrendForecast(2), {"a": 2}, 0)
    forecaster.observe(torch.tensor([3, 9]))
    assert forecaster.errors_r.tolist() == [0] and forecaster.loads()["a"].tolist() == [3, 9]


def test_the_error_is_the_share_of_rows_that_went_elsewhere():
    assert misplaced_permille(np.array([10, 10]), np.array([300, 300])) == 0
    assert misplaced_permille(np.array([10, 10]), np.array([15, 5])) == 250
    assert misplaced_permille(np.array([10, 0]), np.array([0, 10])) == 1000
    assert misplaced_permille(np.zeros(2, dtype=np.int64), np.array([0, 10])) == 1000
    assert misplaced_permille(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)) == 0
    assert misplaced_permille(np.array([2**40, 2**40]), np.array([2**41, 0])) == 500


# --- the family


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_repeatable_and_whole(name):
    first, again, other = (generate(name, seed, 4, 4, 16, 500) for seed in (3, 3, 4))
    assert first.dtype == np.int64 and first.shape == (4, 4, 16)
    assert (first == again).all() and (first != other).any()
    assert first.min() >= 0 and abs(first.sum() / (4 * 4 * 500) - 1) <= (0.25 if name == "empty" else 0.001)


def imbalance(loads_tPE: np.ndarray) -> np.ndarray:
    """Largest expert load over the mean, of every step."""
    loads_tE = loads_tPE.sum(1)
    return loads_tE.max(1) / loads_tE.mean(1)


def test_cases_are_what_they_are_called():
    made = {name: generate(name, 0, 2 * BURST_PERIOD, 8, 32, 4000) for name in NAMES}
    assert imbalance(made["balanced"]).max() < 1.15
    widths = [imbalance(generate(f"lognormal_{sigma}", 0, 60, 4, 64, 4000)).mean()
              for sigma in ("0.5", "1", "1.5")]
    assert widths == sorted(widths) and widths[0] > 2
    assert np.allclose(imbalance(made["hot_expert"]) / 32, 1 / 3, atol=0.02)
    ranks = made["hot_rank"].sum(1).reshape(-1, 8, 4).sum(2)
    assert np.allclose(ranks.max(1) / ranks.sum(1), 1 / 2, atol=0.02)
    sources = made["ragged"].sum((0, 2))
    assert sources.max() > 10 * sources.min() > 0
    hottest = made["rotating"].sum(1).argmax(1)
    assert len(set(hottest[:ROTATION_STEPS])) == 1 and len(set(hottest)) == 3
    assert [step for step, wide in enumerate(imbalance(made["burst"]) > 2) if wide] == [
        start + step for start in (0, BURST_PERIOD)
        for step in range(BURST_PERIOD - BURST_STEPS, BURST_PERIOD)]
    assert 0 in made["empty"].sum((0, 1)) and 0 in made["empty"].sum((0, 2))

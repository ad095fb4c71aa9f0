"""Forecasts of loads, and the family of loads that planners are compared on."""

import json

import numpy as np
import pytest

from moetrain.plan.forecast import MeanForecast, TrendForecast, misplaced_permille
from moetrain.plan.loads import DOZEN, LASTS, NAMES, TURN, generate

FORECASTS = [lambda: MeanForecast(), lambda: MeanForecast(window=1), lambda: TrendForecast(), lambda: TrendForecast(0.3, 0.0)]
IDS = ["mean", "last", "trend", "average"]


def test_the_mean_is_over_the_window_and_rounded():
    forecast = MeanForecast(window=3)
    for loads in ([100, 0], [1, 2], [2, 2], [2, 3]):
        forecast.observe(np.array(loads))
    assert forecast.forecast().tolist() == [2, 2]                   # 5/3 and 7/3
    assert forecast.forecast().dtype == np.int64


def test_a_trend_runs_ahead_of_a_mean_and_never_below_nothing():
    trend, mean = TrendForecast(level=0.5, trend=0.5), MeanForecast()
    for step in range(20):
        for forecast in (trend, mean):
            forecast.observe(np.array([100 * step, 2000 - 200 * step if step < 10 else 0]))
    assert abs(int(trend.forecast()[0]) - 2000) < 60 < 2000 - int(mean.forecast()[0])
    assert int(trend.forecast().min()) >= 0


def test_a_level_alone_is_an_exponential_average():
    forecast = TrendForecast(level=0.25, trend=0.0)
    for load in (1000, 0, 0):
        forecast.observe(np.array([load]))
    assert forecast.forecast().tolist() == [563]                    # 1000 * 0.75 ** 2 = 562.5


@pytest.mark.parametrize("make", FORECASTS, ids=IDS)
def test_loads_that_stay_are_expected_exactly(make):
    forecast = make()
    assert forecast.forecast() is None
    for _ in range(7):
        forecast.observe(np.array([7, 0, 123456789012]))
    assert forecast.forecast().tolist() == [7, 0, 123456789012]


@pytest.mark.parametrize("make", FORECASTS, ids=IDS)
def test_a_resumed_forecast_goes_on_as_if_nothing_had_happened(make):
    seen = generate("lognormal_1", 0, 9, 2, 8, 1000).sum(1)
    whole, resumed = make(), make()
    for at, loads_L in enumerate(seen):
        if at in (0, 1, 6):
            state = json.loads(json.dumps(resumed.state()))
            resumed = make()
            resumed.restore(state)
        for forecast in (whole, resumed):
            forecast.observe(loads_L)
    assert whole.forecast().tolist() == resumed.forecast().tolist()


def test_what_was_observed_may_be_written_over():
    forecast, loads_L = MeanForecast(), np.array([4, 4])
    forecast.observe(loads_L)
    loads_L[:] = 9
    assert forecast.forecast().tolist() == [4, 4]


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
    made = {name: generate(name, 0, 2 * DOZEN, 8, 32, 4000) for name in NAMES}
    assert imbalance(made["balanced"]).max() < 1.15
    widths = [imbalance(generate(f"lognormal_{sigma}", 0, 60, 4, 64, 4000)).mean() for sigma in ("0.5", "1", "1.5")]
    assert widths == sorted(widths) and widths[0] > 2
    assert np.allclose(imbalance(made["hot_expert"]) / 32, 1 / 3, atol=0.02)
    ranks = made["hot_rank"].sum(1).reshape(-1, 8, 4).sum(2)
    assert np.allclose(ranks.max(1) / ranks.sum(1), 1 / 2, atol=0.02)
    sources = made["ragged"].sum((0, 2))
    assert sources.max() > 10 * sources.min() > 0
    hottest = made["rotating"].sum(1).argmax(1)
    assert len(set(hottest[:TURN])) == 1 and len(set(hottest)) == 3
    assert [step for step, wide in enumerate(imbalance(made["burst"]) > 2) if wide] == [
        start + step for start in (0, DOZEN) for step in range(DOZEN - LASTS, DOZEN)]
    assert 0 in made["empty"].sum((0, 1)) and 0 in made["empty"].sum((0, 2))

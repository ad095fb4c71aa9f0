"""Fits of cost curves: known costs come back, nothing is negative, and what is no line becomes a table."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moetrain.plan.schedule.cost_curve import CostLine, CostTable, fit_cost

SIZES = [2.0 ** 18 * number for number in range(1, 25)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2 ** 32 - 1), st.floats(-6, -2), st.floats(-0.3, 2))
def test_known_costs_come_back_from_noisy_timings(seed, latency, ratio):
    """Within 5 %, where latency has a part in the times that noise does not hide."""
    line = CostLine(10 ** latency, 10 ** (latency - ratio) / SIZES[0])
    draw = np.random.default_rng(seed)
    late = lambda: 0.02 * np.abs(draw.standard_normal(9)) * (draw.random(9) < 0.5)
    measured = {size: line.seconds(size) * (1 + late()) for size in SIZES}
    found = fit_cost(measured)
    assert isinstance(found.curve, CostLine)
    assert found.curve.per_unit_s == pytest.approx(line.per_unit_s, rel=0.05)
    if line.latency_s > 0.5 * line.per_unit_s * SIZES[0]:
        assert found.curve.latency_s == pytest.approx(line.latency_s, rel=0.05)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.floats(1, 1e9), st.lists(st.floats(1e-7, 1e3), min_size=1, max_size=5),
                       min_size=3, max_size=12), st.floats(0, 1e10))
def test_no_cost_is_negative(measured, size):
    found = fit_cost(measured)
    assert min(found.line) >= 0 and found.curve.seconds(size) >= 0 and found.line.seconds(size) >= 0


def test_costs_that_fall_with_size_have_no_negative_slope():
    found = fit_cost({1: [3.0], 2: [2.0], 3: [1.0]})
    assert found.line == (pytest.approx((1 / 3 + 1 / 2 + 1) / (1 / 9 + 1 / 4 + 1)), 0)


def test_a_bent_cost_becomes_the_table_that_was_measured():
    """Tiles make small products cost alike; a line is far off there."""
    rows = (16, 32, 64, 128, 256, 1024, 4096, 16384)
    found = fit_cost({float(each): [1e-3 * max(1, each / 256)] for each in rows})
    assert isinstance(found.curve, CostTable) and found.errors["small"] > 0.1
    assert found.curve.seconds(64) == pytest.approx(1e-3)
    assert found.curve.seconds(640) == pytest.approx(2.5e-3)
    assert found.curve.seconds(32768) == pytest.approx(0.128)
    assert found.curve.seconds(0) == 0 and found.curve.seconds(1) == pytest.approx(1e-3)


@pytest.mark.parametrize("measured", [{1: [1.0], 2: [2.0]}, {0: [1.0], 1: [1.0], 2: [2.0]},
                                      {1: [0.0], 2: [1.0], 3: [1.0]},
                                      {1: [float("nan")], 2: [1.0], 3: [1.0]}])
def test_too_little_or_impossible_measurements_are_refused(measured):
    with pytest.raises(ValueError):
        fit_cost(measured)


def test_one_outlier_among_the_repetitions_changes_nothing():
    exact = {size: [1e-3 + 1e-9 * size] * 5 for size in SIZES}
    spiked = {size: [*times[:4], 1.0] for size, times in exact.items()}
    assert fit_cost(spiked) == fit_cost(exact)

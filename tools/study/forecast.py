"""Value of load forecasts and of calibration: error and modeled step over synthetic cases.

    python -m tools.study.forecast --out forecast.json

The cases are those of plan/loads/synthetic.py: one layer of 64 experts on two nodes of four positions, with
the sizes and links of `hardware=h100` and a planner. For every step of a case the loads are forecast from
those before it, copies planned, and the step is timed by plan/cost/step_time.py with the rows that it really
has. `ideal` plans from the step's own loads, `none` has no copies. Nothing is measured.
"""

import argparse
import json
from collections.abc import Iterator
from typing import NamedTuple

import torch

from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.plan.calibration import calibrate
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import gather_seconds, step_time
from moetrain.plan.loads.forecast import LoadForecaster, forecast_of
from moetrain.plan.loads.synthetic import NAMES, generate
from moetrain.plan.placement import contiguous
from moetrain.plan.planners.base import LayerPlan
from moetrain.plan.splitting.rules import rule_of

POSITIONS, EXPERTS, STEPS, FIRST, ROOM = 8, 64, 48, 8, 2
DIM, WIDTH, TOKENS, TOP_K, LENGTH = 2048, 1408, 8192, 6, 4096
TOPOLOGY, HOMES = Topology(POSITIONS, 4), contiguous(EXPERTS, POSITIONS)
WAYS = {"mean": ("mean", 5, 1000), "last step": ("mean", 1, 1000), "trend": ("trend", 5, 1000),
        "mean, falls back at 300": ("mean", 5, 300), "mean, falls back at 150": ("mean", 5, 150),
        "trend, falls back at 150": ("trend", 5, 150)}


class Step(NamedTuple):
    """Modeled seconds of a step, and what forecast and calibration did in it."""

    seconds: float
    calibrated_s: float          # with calibration
    added: int                   # copies that calibration adds
    error: int                   # of the forecast, in thousandths
    fell_back: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where the figures go, .json")
    parser.add_argument("--planner", default="balanced")
    parser.add_argument("--cases", nargs="+", default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    config = compose(["parallel=fssdp", f"planner={options.planner}", "hardware=h100"])
    planner, costs, found = build(config.planner, "planner"), costs_of(config.hardware), {}
    for case in options.cases:
        traces = [torch.from_numpy(generate(case, seed, STEPS, POSITIONS, EXPERTS, TOKENS * TOP_K))
                  for seed in range(options.seeds)]
        rows = [n_PE for trace in traces for n_PE in trace[FIRST:]]
        found[case] = {
            "none": {"ms": mean(1e3 * total_s(n_PE, LayerPlan(HOMES), "local_first", costs)
                                for n_PE in rows)},
            "ideal": {"ms": mean(1e3 * total_s(n_PE, planned(planner, n_PE.sum(0).numpy(), costs),
                                               planner.rule, costs) for n_PE in rows)}}
        for name, way in WAYS.items():
            steps = [step for trace in traces for step in replay(trace, way, planner, costs)]
            found[case][name] = {
                "ms": mean(1e3 * s.seconds for s in steps),
                "calibrated_ms": mean(1e3 * s.calibrated_s for s in steps),
                "added": mean(s.added for s in steps), "error": mean(s.error for s in steps) / 1000,
                "largest_error": max(s.error for s in steps) / 1000,
                "fell_back": mean(s.fell_back for s in steps)}
        print(case, *(f"  {name:25} " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
                      for name, figures in found[case].items()), sep="\n", flush=True)
    with open(options.out, "w") as file:
        json.dump(found, file, indent=1)


def costs_of(hardware) -> Costs:
    """Costs as train/setup.py computes them, in bfloat16."""
    numbers, attention = 3 * DIM * WIDTH, 2 * TOKENS * (4 * DIM**2 + 2 * LENGTH * DIM)
    return Costs(row_s=6 * numbers / hardware.flops, row_bytes=2 * DIM, expert_bytes=2 * numbers,
                 inside=hardware.inside, between=hardware.between, latency_s=hardware.latency_s,
                 hidden_s=attention / hardware.flops)


def replay(trace: torch.Tensor, way: tuple[str, int, int], planner, costs: Costs) -> Iterator[Step]:
    """Forecast, plan and time the steps of a trace.

    Args:
        trace: int64 [steps, positions, experts], rows.
        way: kind and window of the forecast, and the error in thousandths beyond which the last step counts.
        planner: the planner.
        costs: figures of the machine.
    """
    kind, window, fallback = way
    forecaster = LoadForecaster(forecast_of(kind, EXPERTS, window), {"layer": EXPERTS}, fallback)
    for number, n_PE in enumerate(trace):
        fell_back = int(forecaster.errors_r) > fallback
        plan = planned(planner, forecaster.loads()["layer"], costs)
        forecaster.observe(n_PE.sum(0))
        if number < FIRST:
            continue
        seconds = total_s(n_PE, plan, planner.rule, costs)
        more = calibrate(n_PE, plan, planner, TOPOLOGY, costs, ROOM)
        added, after_s = 0, seconds
        if more is not None:
            # Forward, added copies travel by themselves, and nothing hides them.
            missing = more.placement.beyond(plan.placement)
            both_s, plan_s = (gather_seconds(placement, TOPOLOGY, costs)
                              for placement in (more.placement, plan.placement))
            after_s = total_s(n_PE, more, planner.rule, costs) + gather_seconds(missing, TOPOLOGY, costs)
            after_s -= max(0.0, both_s - costs.hidden_s) - max(0.0, plan_s - costs.hidden_s)
            added = len(missing.copies)
        yield Step(seconds, after_s, added, int(forecaster.errors_r), fell_back)


def planned(planner, loads_E, costs: Costs) -> LayerPlan:
    return planner.plan(loads_E, HOMES, TOPOLOGY, costs, ROOM)


def total_s(n_PE: torch.Tensor, plan: LayerPlan, rule: str, costs: Costs) -> float:
    split_PC = rule_of(rule, plan, TOPOLOGY, costs).split(n_PE, plan.placement, 0)
    return step_time(split_PC, plan.placement, TOPOLOGY, costs).total_s


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    main()

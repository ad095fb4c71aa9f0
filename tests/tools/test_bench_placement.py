"""The bench of planners: what is counted is what must be sent, and what is printed follows from the steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.plan.loads.synthetic import generate
from moetrain.plan.placement import ExpertPlacement
from tools.bench import (
    placement as bench_placement,
    placement_ranks,
    placement_report as placement_result,
    planner as bench_planner,
)
from tools.netlab import lab as netlab

PLANNERS = bench_placement.PLANNERS
SIZES = placement_ranks.Sizes(dim=8, expert_dim=4, row_s=1e-4, hidden_s=1e-3, inside=1e8, between=1e7)


def metered(trace: np.ndarray, planner: str, per_node: int,
            sliced: tuple[int, ...]) -> tuple[list[int], int, placement_ranks.Traffic]:
    """Replay a step on this rank; `sliced` are experts cut up between positions.

    Returns the bytes that the rank handed over for each other, its calls, and what both should be for all
    ranks.
    """
    from moetrain.comm.mesh import build_mesh, mesh_sizes

    positions, experts = trace.shape[1:]
    group = build_mesh(mesh_sizes("fssdp", positions, None), torch.device("cpu"))["ep"]
    stack = placement_ranks.Stack(SIZES, experts, group, per_node, paced=False)
    stack.start(ExpertPlacement(tuple(
        (name, homes.with_sliced(sliced)) for name, homes in stack.homes.layers)))
    extra = ["planner.min_rows=8"] if planner == "llep" else []
    built = build(compose([f"planner={planner}", "parallel=fssdp", *extra]).planner, "planner")
    loads = placement_ranks.Arm.parse(f"{planner}+oracle+nodes").loads(trace, 0, per_node)
    stack.adopt(built.rule, placement_ranks.plans_of(stack, built, loads, 2))
    meter, n_PE = placement_ranks.Meter(), torch.from_numpy(trace[0])
    with meter.counting():
        stack.step(n_PE[group.position])
    return meter.sent_P.tolist(), meter.calls, stack.expected(n_PE)


def all_ranks(ranks, trace: np.ndarray, planner: str, per_node: int,
              sliced: tuple[int, ...] = ()) -> placement_ranks.Traffic:
    """What the ranks sent, after a comparison with what they should have."""
    found = ranks(4).run(metered, trace, planner, per_node, sliced)
    expected = found[0][2]
    assert [sent for sent, _, _ in found] == expected.bytes_PP.tolist()
    assert [calls for _, calls, _ in found] == [expected.calls] * 4
    return expected


@pytest.mark.ranks
@pytest.mark.parametrize("planner", PLANNERS)
def test_bytes_and_calls_are_what_follows_from_rows_plan_and_sizes(ranks, planner):
    for name, per_node in (("hot_rank", 2), ("empty", 4)):
        sent = all_ranks(ranks, generate(name, 3, 1, 4, 8, 60), planner, per_node)
        # Of two layers: counts, rows four times, copies there and back.
        assert sent.calls in (10, 14)
    if planner not in ("ep", "shadow"):
        assert sent.calls == 14                          # there were copies to count
    in_pieces = all_ranks(ranks, generate("hot_rank", 3, 1, 4, 8, 60), planner, 2, (0, 5))
    assert in_pieces.calls in (14, 18)                   # pieces there and back, with or without whole copies


@pytest.mark.ranks
def test_at_balance_ours_sends_and_calls_what_expert_parallelism_does(ranks):
    even = np.full((1, 4, 8), 20)
    ours, plain = (all_ranks(ranks, even, planner, 2) for planner in ("balanced", "ep"))
    assert ours.bytes_PP.tolist() == plain.bytes_PP.tolist() and ours.calls == plain.calls == 10
    # By hand: 40 rows for each rank; to it and back, forward and backward, 8 numbers each and the weight
    # twice; counts of 2 slots.
    assert plain.bytes_PP[0, 1] == 2 * (40 * 2 * (8 * 8 + 4) + 2 * 8)


def test_links_are_told_apart():
    bytes_PP = np.arange(16).reshape(4, 4)
    assert placement_ranks.by_link(bytes_PP, 2) == {
        "inside": 1 + 4 + 11 + 14, "between": 2 + 3 + 6 + 7 + 8 + 9 + 12 + 13}


def test_planners_are_tuned_and_judged_on_other_seeds():
    tuning, judged = (set(bench_placement.SEEDS[name]) for name in ("tuning", "judged"))
    assert not tuning & judged


def test_an_arm_is_told_what_its_name_says():
    trace = generate("rotating", 1, 8, 4, 8, 100)
    before, now = trace[2:7].sum((0, 1)) // 5, trace[7]
    assert placement_ranks.Arm.parse("ep").loads(trace, 7, 2).tolist() == before.tolist()
    assert placement_ranks.Arm.parse("ep+oracle").loads(trace, 7, 2).tolist() == now.sum(0).tolist()
    loads = placement_ranks.Arm.parse("ep+oracle+nodes").loads(trace, 7, 2)
    assert loads.tolist() == [now[:2].sum(0).tolist(), now[2:].sum(0).tolist()]
    with pytest.raises(SystemExit):
        placement_ranks.Arm.parse("ep+magic")


def test_recorded_loads_keep_their_sources_and_layers(tmp_path: Path):
    sources = np.random.default_rng(0).integers(0, 50, (30, 2, 8, 6))
    sources[:, 1, :, 4:] = 0                             # the second layer has fewer experts
    file = tmp_path / "mine.npz"
    whole = {"loads": sources.sum(2), "experts": [6, 4], "routers": ["layers.0.moe", "layers.1.moe"],
             "steps": np.arange(1, 31)}
    np.savez(file, sources=sources, **whole)
    found = dict(bench_placement.recorded(str(file), 4, 10, -1))
    assert list(found) == ["mine layers.0", "mine layers.1"]
    assert found["mine layers.1"].tolist() == sources[-10:, 1, :, :4].reshape(10, 4, 2, 4).sum(2).tolist()
    np.savez(file, **whole)
    totals = dict(bench_placement.recorded(str(file), 4, 10, 6))["mine layers.0 (sources alike)"]
    assert totals.sum(1).tolist() == whole["loads"][0:10, 0].tolist() and np.ptp(totals, axis=1).max() <= 1


def test_a_ratio_of_pairs_is_blind_to_what_both_suffer():
    draw = np.random.default_rng(1)
    common = np.exp(draw.normal(0, 1, 12))
    exact = placement_result.ratio((1.5 * common).tolist(), common.tolist())
    assert list(exact) == pytest.approx([1.5, 1.5, 1.5])
    noisy = placement_result.ratio(draw.uniform(0.5, 1.5, 40).tolist(), draw.uniform(0.5, 1.5, 40).tolist())
    assert noisy.low < noisy.value < noisy.high and noisy.low < 1 < noisy.high


def test_recovered_is_the_share_of_the_way_to_the_ceiling():
    seconds = {"ep": [3.0, 3.0], "ceiling": [2.0, 2.0], "ours": [2.0, 2.4], "other": [3.2, 3.2]}
    assert placement_result.recovered(seconds, "ours") == pytest.approx(0.8)
    assert placement_result.recovered(seconds, "other") == pytest.approx(-0.2)
    assert placement_result.recovered({**seconds, "ceiling": [2.9, 2.9]}, "ours") is None


def test_traces_measured_on_a_busy_machine_are_left_out():
    trace = {"seconds": {"ceiling": [1.0, 1.0, 1.0]}}
    slow = {"seconds": {"ceiling": [1.2, 1.3, 1.0]}}
    result, busy = placement_result.quiet({"traces": {"fine": trace, "slow": slow}})
    assert list(result["traces"]) == ["fine"] and busy == ["slow"]


def test_page_and_picture_state_what_was_measured(tmp_path: Path):
    counts = {"inside": 2e6, "between": 1e6, "calls": 10, "copies": 0}
    arms = {"ep": [0.30, 0.30], "balanced": [0.20, 0.20], "ceiling": [0.18, 0.18]}
    trace = {"seconds": arms, "sent": dict.fromkeys(arms, counts), "rank_load": 2.1,
             "unpaced": {"seconds": arms}}
    options = {"planners": ["ep", "balanced"], "steps": 2, "real_steps": 2, "nodes": 2, "per_node": 2,
               "inside": "900mbit", "between": "100mbit", "dim": 128, "expert_dim": 32, "rows": 256,
               "row_us": 200.0, "hidden_ms": 20.0, "max_copies": 2}
    facts = {"machine": "9 cores", "torch": "x", "commit": "abc1234", "command": "python tools/this",
             "load average": [0, 1]}
    result = {"facts": facts, "options": options, "links": ["a line"],
              "wire_bytes": {"inside": 1, "between": 2}, "handed_over_bytes": 2,
              "unpaced_row_us": 15.0, "traces": {"mine": trace}}
    page = tmp_path / "placement.md"
    joined = bench_placement.joined([result, {**result, "traces": {"yours": trace}}])
    assert list(joined["traces"]) == ["mine", "yours"] and joined["handed_over_bytes"] == 4
    with pytest.raises(SystemExit, match="alike: rows"):
        bench_placement.joined([result, {**result, "options": {**options, "rows": 9}}])
    placement_result.write(result, page)
    text = page.read_text()
    assert "| mine | 2.10 | 300 | 180 | 1.67x | 1.50x [1.50, 1.50] 83% |" in text
    assert "- mine, recorded, rank load 2.1: 83% recovered (target: 80%)" in text
    assert all(fact in text for fact in ("9 cores", "abc1234", "python tools/this", "900mbit", "100mbit",
                                         "1.500 times"))
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    pages = {bench_placement.page_of({**options, "per_node": per_node}).name for per_node in (2, 4)}
    assert pages == {"placement.md", "placement_2x4.md"}     # one set-up does not write over another's


@pytest.mark.slow
@pytest.mark.ranks
def test_a_study_runs_over_emulated_links(tmp_path: Path):
    try:
        with netlab.Lab(nodes=1, per_node=1, inside="1gbit"):
            pass
    except netlab.LabError as error:
        pytest.skip(str(error))
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "tools.bench.placement", "--loads", "synthetic", "--traces", "hot_rank",
               "--planners", "ep", "balanced", "--oracle", "--steps", "2", "--real-steps", "1",
               "--rows", "64", "--between", "900mbit", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    (trace,) = result["traces"].values()
    assert list(trace["seconds"]) == ["ep", "balanced", "balanced+oracle", "ceiling"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in trace["seconds"].values())
    carried, handed = sum(result["wire_bytes"].values()), result["handed_over_bytes"]
    assert handed < carried < 1.5 * handed  # TCP's headers, acknowledgements and barriers on top


def test_planners_are_clocked_at_growing_sizes():
    options = bench_planner.argparse.Namespace(experts=16, max_copies=1, repeats=2, limit=9.0,
                                               positions=[16, 32])
    planner = build(compose(["planner=balanced", "parallel=fssdp"]).planner, "planner")
    rows = [row for form in ("by expert", "by node")
            for row in bench_planner.growth("balanced", planner, form, options)]
    assert [row["positions"] for row in rows] == [16, 32, 16, 32]
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in rows)
    assert all(f"{row['least_ms']:.2f}" in bench_planner.table(rows) for row in rows)
    assert bench_planner.loads_of(0, bench_planner.Topology(16, 8), 16, "by node").shape == (2, 16)

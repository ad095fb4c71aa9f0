"""The choice between graphs and a counting pass follows from memory, on all ranks, and changes no number."""

from pathlib import Path

import pytest
import torch

from moetrain.machine import job_memory, machine_memory
from moetrain.train.loggers.banner import balance_line
from moetrain.train.memory import graph_memory as memory
from moetrain.train.memory.graph_memory import choose_graphs, measure_graph
from moetrain.train.state import Graphs
from moetrain.train.step import train_step
from tests.support.training import difference, make_run, snapshot, whole

ACCUMULATED = ["run.dtype=float64", "data.min_length=0.3", "train.micro_batch=4", "train.seq_len=24"]
MODELS = {
    "plain": [], "recomputed": ["train.activation_checkpointing=full"],
    "head in chunks": ["train.head_chunk=16"],
    "attached": ["train.aux_loss=injected"], "shared expert": ["model.num_shared_experts=1"],
    "bfloat16": ["run.dtype=bfloat16"],
    "dropping": ["capacity=position", "capacity.factor=1"], "sigmoid": ["router=sigmoid"],
}


def most_in_use(overrides: list[str]) -> int:
    """Bytes that the forward passes of a step keep together, by the allocator's own events."""
    run = make_run(overrides)
    seen = []
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        for number, batch in enumerate(run.loader.step(1)):
            seen.append(memory.forward_pass(run, 1, batch, lambda found: []))
    held = sum(event.self_cpu_memory_usage for event in recorded.key_averages())
    del seen
    return held


@pytest.mark.parametrize("model", MODELS)
def test_a_graph_takes_what_was_measured(model):
    overrides = [*ACCUMULATED, *MODELS[model]]
    run = make_run(overrides)
    assert run.loader.micro_batches == 4
    assert most_in_use(overrides) == pytest.approx(4 * measure_graph(run), rel=0.05)


def test_recomputing_takes_less():
    plain, full = (measure_graph(make_run([*ACCUMULATED, *MODELS[model]]))
                   for model in ("plain", "recomputed"))
    assert full < 0.5 * plain


def with_memory(overrides: list[str], free: list[int] | None,
                rank: int = 0) -> tuple[Graphs, str, dict, list]:
    """Take two steps after the choice, with this much free memory on each rank.

    With None no choice is made and graphs are kept. One step runs before, so that experts have copies.
    """
    run, original = make_run([*ACCUMULATED, *overrides]), memory.free_memory
    train_step(run, 1)
    if free is not None:
        memory.free_memory = lambda mesh, share_gpu: free[mesh.rank]
        try:
            run.graphs = choose_graphs(run)
        finally:
            memory.free_memory = original
    results = [train_step(run, step) for step in (2, 3)]
    return (run.graphs, balance_line(run, 4), snapshot(run, lambda parameter: parameter.data),
            [result.metrics for result in results])


MUCH, LITTLE = 10**12, 10**5
COPIES = ["parallel=fssdp", "hardware.flops=1e4"]       # slow products: copies pay
SPREADS = {
    "experts": (2, ["parallel=ep"]),
    "experts, recomputed": (2, ["parallel=ep", "train.activation_checkpointing=selective"]),
    "experts over memory, in chunks": (
        2, ["parallel=ep", "parallel.exchange=peer", "schedule=fixed", "schedule.chunks=2"]),
    "sharded": (2, ["parallel=fsdp"]), "both": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
    "copies": (2, COPIES), "copies gathered again": (2, [*COPIES, "parallel.rematerialize=true"]),
    "copies after the gate": (2, [*COPIES, "parallel.calibrate=true"]),
    "copies of pieces": (2, [*COPIES, "parallel.max_sliced_experts=2", "parallel.rehome_interval=1"]),
}


FULL = ("both", "experts, recomputed")                   # each combines what others show


@pytest.mark.ranks
@pytest.mark.parametrize("spread", [pytest.param(spread, marks=pytest.mark.full) if spread in FULL
                                    else spread for spread in SPREADS])
def test_one_rank_without_room_decides_for_all_and_no_bit_changes(ranks, spread):
    world, overrides = SPREADS[spread]
    overrides = [*overrides, f"run.nproc={world}", f"train.micro_batch={4 // world}"]
    unchosen = ranks(world).run(with_memory, overrides, None)
    for free, kept in (([MUCH] * world, True), ([*[MUCH] * (world - 1), LITTLE], False)):
        found = ranks(world).run(with_memory, overrides, free)
        assert {graphs.kept for graphs, *_ in found} == {kept}
        assert len({graphs for graphs, *_ in found}) == 1 and found[0][0].free == min(free)
        assert difference(whole([parameters for _, _, parameters, _ in found]),
                          whole([parameters for _, _, parameters, _ in unchosen]))[0] == 0
        for ours, theirs in zip(found, unchosen):
            assert [step["loss/total"] for step in ours[-1]] == [step["loss/total"] for step in theirs[-1]]
            assert all(step["moe/copies"] > 0 for step in ours[-1]) or not spread.startswith("copies")


def test_the_banner_says_what_was_chosen_and_why():
    kept, counted = (with_memory([], [free]) for free in (MUCH, LITTLE))
    size = f"{kept[0].graph / 1000:.3g} kB"
    assert f"keeps the graphs of 4 micro-batches (4 x {size}, 1 TB free)" in kept[1]
    assert f"counts in a pass of its own (graphs would take 4 x {size}, 100 kB free)" in counted[1]


def test_room_is_needed_for_all_graphs_for_a_backward_and_for_gradients():
    run = make_run(ACCUMULATED)
    train_step(run, 1)
    gradients = sum(parameter.nbytes for parameter in run.state.model.parameters())
    needed = (5 * measure_graph(run) + gradients) / memory.MAX_SHARE
    assert with_memory([], [int(1.001 * needed)])[0].kept
    assert not with_memory([], [int(0.999 * needed)])[0].kept


NO_CHOICE = {"kept by hand": "train.count_pass=false", "counted by hand": "train.count_pass=true",
             "one micro-batch": "train.micro_batch=16",
             "another mode": "balance.mode=buffer", "the counts of a micro-batch": "balance=micro"}


@pytest.mark.parametrize("case", NO_CHOICE)
def test_nothing_runs_where_there_is_no_choice(case, monkeypatch):
    run = make_run([*ACCUMULATED, NO_CHOICE[case]])
    monkeypatch.setattr(memory, "free_memory", lambda mesh, share_gpu: LITTLE)
    monkeypatch.setattr(memory, "forward_pass", lambda *arguments: pytest.fail("a forward pass"))
    assert choose_graphs(run) == Graphs(kept=case != "counted by hand")


def test_dumps_have_nothing_of_the_measurement(tmp_path):
    run = make_run([*ACCUMULATED, "log.router_dump=true"])
    choose_graphs(run)
    assert run.dump.micro_batches == 0 and not run.dump.tensors


# --- what is free


def group(path: Path, limit: str, usage: int, cached: int, second: bool) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file") if second else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (path / names[0]).write_text(f"{limit}\n")
    (path / names[1]).write_text(f"{usage}\n")
    (path / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nother 7\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_any_level_of_the_job_counts(tmp_path, version):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    memory_of = root if version == 2 else root / "memory"
    membership.write_text("0::/slurm/job_7/step_0\n" if version == 2
                          else "3:cpuset:/else\n4:memory:/slurm/job_7/step_0\n0::/\n")
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    group(memory_of / "slurm/job_7/step_0", unlimited, 300, 0, version == 2)
    group(memory_of / "slurm/job_7", "1000", 700, 100, version == 2)
    group(memory_of / "slurm", "5000", 1000, 0, version == 2)
    assert min(job_memory(membership, root)) == 400
    assert 4000 in job_memory(membership, root)


def test_a_container_that_sees_only_its_own_group(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/../../docker/abc\n")
    group(tmp_path / "cgroup", "2000", 1500, 0, True)
    assert job_memory(membership, tmp_path / "cgroup") == [500]


def test_a_job_above_its_limit_has_nothing_left(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/\n")
    group(tmp_path / "cgroup", "2000", 2500, 0, True)
    assert job_memory(membership, tmp_path / "cgroup") == [1]


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert job_memory(tmp_path / "none", tmp_path) == []


def test_what_the_machine_has(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:   70 kB\n")
    assert machine_memory(meminfo) == 70 * 1024
    assert machine_memory(tmp_path / "none") >= machine_memory() > 0

"""A checkpoint of any mesh loads on any other, and what one rank meets all ranks know.

Two steps on one mesh, a save, a load on another mesh, two more steps: equal to four steps in one process, in
float64 to 1e-10. Right after the load every tensor is the saved one to the bit, moments included, and every
expert has its own content. Sizes are such that rows divide unevenly, some ranks hold no rows at all, and
expert stacks are cut by experts as well as by rows.
"""

import errno
import threading
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.checkpoint import disk
from moetrain.checkpoint.manifest import checkpoints_of, read_manifest
from moetrain.checkpoint.verify import problems
from moetrain.comm.reduce import sum_over
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import CheckpointError, DiskError
from moetrain.train.checkpoint.load import resume
from moetrain.train.checkpoint.save import SaveFlags, Saver, save
from moetrain.train.state import OPTIONAL, Run
from moetrain.train.step import train_step
from tests.support.checkpoints import flip
from tests.support.training import Held, difference, make_run, snapshot, whole

SIZES = ["run.dtype=float64", "data.vocab_size=50", "model.qk_norm=head", "model.num_shared_experts=1",
         "balance.weight=0.1", "run.packages=[tests]",
         "train.micro_batch=4"]
# 6 do not divide over 4 ranks: stacks are cut by rows
EVEN, ODD = "model.num_experts=[8,12]", "model.num_experts=6"
# Experts of vectors and matrices, of another width in each layer
BIASED = f"{ODD} model.expert_dim=[16,10] expert._target_=tests.support.expert_forms.BiasedExpert"
# PR-MoE: of the 4 positions of fssdp4 two hold no expert of the first layer
PYRAMID = "model.num_experts=[2,6] model.top_k=[1,2] router.weights=raw model.block=residual"
LAYOUTS = {
    "single": (1, []),
    "ddp2": (2, ["parallel=ddp"]), "ddp4": (4, ["parallel=ddp"]),
    "ep2": (2, ["parallel=ep"]), "ep4": (4, ["parallel=ep"]), "ep2of4": (4, ["parallel=ep", "parallel.ep=2"]),
    "fsdp2": (2, ["parallel=fsdp"]), "fsdp4": (4, ["parallel=fsdp"]),
    "hsdp4": (4, ["parallel=fsdp", "parallel.shard=2"]),
    "ep_fsdp2": (2, ["parallel=ep_fsdp"]), "ep2_fsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
    "ep2_hsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=2", "parallel.shard=2"]),
    "ep1_hsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=1", "parallel.shard=2"]),
    "fssdp2": (2, ["parallel=fssdp"]), "fssdp4": (4, ["parallel=fssdp"]),
    "fssdp2of4": (4, ["parallel=fssdp", "parallel.ep=2"]),
}
NAMES = list(LAYOUTS)
QUICK = [(ODD, "single", "fsdp4"), (ODD, "fsdp4", "ep2_fsdp4"), (ODD, "ep2_fsdp4", "single"),
         (EVEN, "ep4", "hsdp4"), (BIASED, "fsdp4", "fssdp4"),
         (PYRAMID, "ep2", "fssdp4")]
PAIRS = [(EVEN, one, NAMES[(NAMES.index(one) + by) % len(NAMES)])
         for by, some in ((1, NAMES), (5, NAMES[::2])) for one in some] + [
    (ODD, "fsdp4", "ep2of4"), (ODD, "fssdp4", "ep2_fsdp4"), (ODD, "ep2_hsdp4", "fsdp4"),
    (ODD, "hsdp4", "fsdp2"), (ODD, "ddp2", "ep2_hsdp4"),
    (PYRAMID, "fssdp4", "fsdp4"),
    (BIASED, "fssdp4", "ep2_fsdp4"), (BIASED, "ep2", "fsdp4"), (BIASED, "hsdp4", "single")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        everything = [(EVEN, *pair) for pair in product(NAMES, NAMES)]
        slow = everything if metafunc.config.getoption("--all") else PAIRS
        cases = [pytest.param(pair, id=_id(pair)) for pair in QUICK]
        cases += [pytest.param(pair, id=_id(pair), marks=pytest.mark.slow)
                  for pair in slow if pair not in QUICK]
        metafunc.parametrize("pair", cases)


def _id(pair: tuple[str, str, str]) -> str:
    experts, *layouts = pair
    name = {BIASED: "biased", PYRAMID: "pyramid"}.get(experts, experts.removeprefix("model.num_experts="))
    return "-".join([name, *layouts])


def on(ranks, layout: str, function, experts: str, *arguments) -> list:
    """The function on every rank of a layout; in this process where there is one."""
    world, overrides = LAYOUTS[layout]
    overrides = [*SIZES, *experts.split(), *overrides]
    return ([function(overrides, *arguments)] if world == 1
            else ranks(world).run(function, overrides, *arguments))


# --- what runs on every rank


def held(run: Run) -> Held:
    """All state of this rank that every mesh has."""
    return {shard.name: (tuple(shard.shape), shard.begin, shard.rows.detach().clone())
            for shard in run.state.state_shards()
            if not shard.name.startswith(OPTIONAL)}


def save_on(overrides: list[str], run_dir: Path) -> Held:
    """Two steps and a save; then another of the same sizes with every expert full of its own number."""
    run = make_run(overrides)
    for step in (1, 2):
        train_step(run, step)
    state = held(run)
    save(run.state, run_dir / "trained", run.mesh, {})
    for shard in run.state.state_shards():
        if not shard.name.startswith(OPTIONAL):
            shard.rows.fill_(number_of(shard.name))
    save(run.state, run_dir / "numbered", run.mesh, {})
    return state


def load_on(overrides: list[str], run_dir: Path) -> tuple[Held, Held, list[dict], list[Tensor], Held]:
    """(numbered state, loaded state, metrics of steps 3 and 4, their counts, parameters after them)."""
    run = make_run(overrides)
    for shard in run.state.state_shards():
        shard.rows.fill_(float("nan") if shard.rows.is_floating_point() else -1)
    assert resume(run.state, run_dir / "numbered", run.mesh).path.name == "step-00000002"
    numbered = held(run)
    assert resume(run.state, run_dir / "trained", run.mesh).lost == 0
    loaded = held(run)
    results = [train_step(run, step) for step in (3, 4)]
    return (numbered, loaded, [result.metrics for result in results],
            [torch.cat(list(result.counts.values())) for result in results],
            snapshot(run, lambda parameter: parameter.data))


def number_of(name: str) -> float:
    """A number for every tensor of every expert of every layer, and for all others."""
    return float(sum((index + 1) * ord(letter) for index, letter in enumerate(name)))


def load_and_save_on(overrides: list[str], source: Path, target: Path) -> Held:
    """Load, and save anew at once."""
    run = make_run([*overrides, "run.seed=9"])
    resume(run.state, source, run.mesh)
    save(run.state, target, run.mesh, {})
    return held(run)


# --- any mesh to any other


@pytest.fixture(scope="module")
def checkpoints(ranks, tmp_path_factory):
    """checkpoints(experts, layout): (directory, what was saved there), made once each."""

    @cache
    def make(experts: str, layout: str) -> tuple[Path, dict[str, Tensor]]:
        run_dir = tmp_path_factory.mktemp(layout)
        return run_dir, whole(on(ranks, layout, save_on, experts, run_dir))

    return make


@cache
def unbroken(experts: str) -> tuple[list[dict], list[Tensor], dict[str, Tensor]]:
    """Four steps in one process: metrics and counts of steps 3 and 4, parameters after them."""
    run = make_run([*SIZES, *experts.split()])
    results = [train_step(run, step) for step in (1, 2, 3, 4)][2:]
    return ([result.metrics for result in results],
            [torch.cat(list(result.counts.values())) for result in results],
            whole([snapshot(run, lambda parameter: parameter.data)]))


def test_a_checkpoint_of_one_mesh_goes_on_on_another(pair, ranks, checkpoints):
    """T07, T08."""
    experts, written_on, read_on = pair
    run_dir, truth = checkpoints(experts, written_on)
    results = on(ranks, read_on, load_on, experts, run_dir)
    for name, tensor in whole([result[0] for result in results]).items():
        assert (tensor == number_of(name)).all(), f"{name} has the content of another"
    loaded = whole([result[1] for result in results])
    assert loaded.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(loaded[name], tensor), name
    metrics, counts, parameters = unbroken(experts)
    for _, _, ours, our_counts, _ in results:
        for step in (0, 1):
            for key in ("loss/ce", "grad_norm"):
                assert ours[step][key] == pytest.approx(metrics[step][key], rel=1e-10), key
            assert (ours[step]["tokens"] == metrics[step]["tokens"]
                    and torch.equal(our_counts[step], counts[step]))
    error, name = difference(whole([result[4] for result in results]), parameters)
    assert error < 1e-10, (error, name)


@pytest.mark.slow
def test_a_chain_of_meshes_keeps_every_bit(ranks, checkpoints, tmp_path):
    """Loaded and saved anew at every link."""
    source, truth = checkpoints(EVEN, "single")
    source = source / "trained"
    for layout in ("fsdp4", "ep4", "hsdp4", "ddp2", "ep2_fsdp4", "ep2of4", "ep_fsdp2", "single"):
        found = whole(on(ranks, layout, load_and_save_on, EVEN, source, tmp_path / layout))
        source = tmp_path / layout
        assert all(torch.equal(found[name], tensor) for name, tensor in truth.items()), layout
        assert list(problems(checkpoints_of(source)[0])) == []


def test_every_mesh_writes_the_same_tensors(checkpoints):
    """Names and shapes say nothing of the mesh; whole experts are in tables; the bytes are shared out."""
    found = {layout: read_manifest(checkpoints_of(checkpoints(ODD, layout)[0] / "trained")[0])
             for layout in ("single", "fsdp4", "ep2_fsdp4")}
    sizes = {layout: {name: (manifest.entry(name).dtype, manifest.entry(name).shape)
                      for name in manifest.names()}
             for layout, manifest in found.items()}
    assert sizes["single"] == sizes["fsdp4"] == sizes["ep2_fsdp4"]
    assert len(found["single"].experts) == 2 * 2 * 3 and not found["fsdp4"].experts       # cut by rows
    for layout in ("fsdp4", "ep2_fsdp4"):
        bytes_of = [file.size - file.header for file in found[layout].files.values()]
        assert len(bytes_of) == 4 and max(bytes_of) < 1.5 * min(bytes_of)


# --- what one rank meets, all know


def refuse(when: str, what: str, path: Path, length: int) -> None:
    if what == "write":
        raise OSError(errno.ENOSPC, "No space left on device")


def one_rank_cannot_write(overrides: list[str], run_dir: Path) -> list[object]:
    run, outcomes = make_run(overrides), []
    saver = Saver(run_dir, run.mesh, CheckpointConfig(max_failed_saves=2))
    for step in range(1, 5):
        train_step(run, step)
        if step == 2 and run.mesh.rank == 1:
            with disk.observed(refuse):
                saver.begin(run.state, {})
                outcomes.append(saver.finish().path)
        else:
            saver.begin(run.state, {})
            outcomes.append(saver.finish().path)
    with disk.observed(refuse if run.mesh.rank == 1 else lambda *_: None):
        saver.begin(run.state, {})
        saver.finish()
        saver.begin(run.state, {})
        try:
            saver.finish()
        except DiskError as error:
            outcomes.append(error.id)
        except SystemExit as leaving:
            outcomes.append(leaving.code)
    return outcomes


def test_one_rank_that_cannot_write_fails_the_save_on_all_and_training_goes_on(ranks, tmp_path):
    results = ranks(4).run(one_rank_cannot_write, [*SIZES, EVEN, "parallel=ep"], tmp_path)
    path = lambda step: tmp_path / f"checkpoints/step-{step:08d}"  # noqa: E731
    for rank, outcomes in enumerate(results):
        assert outcomes == [path(1), None, path(3), path(4), "E-DISK-005" if rank < 2 else 14]
    assert ([path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
            == ["step-00000003", "step-00000004"])
    assert [error for path in checkpoints_of(tmp_path) for error in problems(path)] == []


def one_rank_writes_late(overrides: list[str], run_dir: Path) -> list[object]:
    run, go = make_run(overrides), threading.Event()
    saver = Saver(run_dir, run.mesh, CheckpointConfig())
    with disk.observed(lambda when, what, path, length: go.wait(60) if run.mesh.rank else None):
        train_step(run, 1)
        saver.begin(run.state, {})
        seen = []
        for step in (2, 3, 4):
            result = train_step(run, step)
            summed = summed_flags(run, saver)
            seen.append(saver.settle(summed))
            assert sum(summed) < run.mesh["batch"].size, result
        go.set()
        outcome = saver.finish()
    return [*seen, outcome.step, outcome.path]


def summed_flags(run: Run, saver: Saver) -> SaveFlags:
    return SaveFlags(*sum_over(run.mesh["batch"], torch.tensor(saver.poll())).tolist())


def test_training_talks_while_one_rank_still_writes(ranks, tmp_path):
    """The thread has no collectives that could meet those of the steps."""
    for outcomes in ranks(2).run(one_rank_writes_late, [*SIZES, EVEN, "parallel=ep"], tmp_path):
        assert outcomes == [None, None, None, 1, tmp_path / "checkpoints/step-00000001"]


def save_two(overrides: list[str], run_dir: Path) -> Held:
    """Checkpoints of steps 1 and 2; the state of the first."""
    run = make_run(overrides)
    train_step(run, 1)
    first = held(run)
    save(run.state, run_dir, run.mesh, {})
    train_step(run, 2)
    save(run.state, run_dir, run.mesh, {})
    return first


def try_resume(overrides: list[str], *run_dirs: Path) -> tuple[object, Held]:
    """Each rank with its own of the directories, the last for all further ones."""
    run = make_run(overrides)
    try:
        found = resume(run.state, run_dirs[min(run.mesh.rank, len(run_dirs) - 1)], run.mesh)
        return found and (found.path.name, found.lost), held(run)
    except CheckpointError as error:
        return error.id, held(run)
    except SystemExit as leaving:
        return leaving.code, held(run)


def test_damage_that_one_rank_finds_makes_all_of_them_take_the_older_one(ranks, tmp_path):
    overrides = [*SIZES, EVEN, "parallel=ep"]
    first = whole(ranks(2).run(save_two, overrides, tmp_path))
    directory = tmp_path / "checkpoints/step-00000002"
    manifest = read_manifest(directory)
    # At home on rank 1: only it reads it
    chunk = manifest.entry("optim.layers.1.moe.experts.11.down.exp_avg").chunks[0]
    flip(directory / chunk.file, chunk.begin)
    results = ranks(2).run(try_resume, overrides, tmp_path)
    assert [outcome for outcome, _ in results] == [("step-00000001", 1)] * 2
    loaded = whole([state for _, state in results])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in first.items())
    assert (tmp_path / "checkpoints/step-00000002.damaged").is_dir()


def test_refusals_are_those_of_all_ranks(ranks, tmp_path):
    """None hangs, none goes on alone."""
    overrides = [*SIZES, EVEN, "parallel=ep"]
    for name in ("one", "two"):
        ranks(2).run(save_two, [*overrides, f"run.seed={name == 'two':d}"], tmp_path / name)
    outcome = lambda *arguments: {result[0] for result in ranks(2).run(try_resume, *arguments)}  # noqa: E731
    assert outcome([*overrides, "data.vocab_size=40"], tmp_path / "one") == {"E-CHECKPOINT-003"}
    assert (outcome([*SIZES, "model.num_experts=[8,8]", "parallel=ep"], tmp_path / "one")
            == {"E-CHECKPOINT-003"})
    assert outcome(overrides, tmp_path / "one", tmp_path / "two") == {"E-CHECKPOINT-006"}
    assert outcome(overrides, tmp_path / "nothing") == {None}
    assert outcome(overrides, tmp_path / "one", tmp_path / "nothing") == {"E-CHECKPOINT-004"}

"""At every moment of a save a checkpoint exists that loads, and it is never older than the one before.

Saves are killed for real: in a child process, by SIGKILL, at each change to the disk.
"""

import os
import shutil
import signal
from itertools import count
from pathlib import Path

import pytest

from moetrain.checkpoint import disk
from moetrain.checkpoint.commit import commit, merge, remove_leftovers, remove_old, write_rank
from moetrain.checkpoint.manifest import checkpoints_of, read_manifest, step_of
from moetrain.checkpoint.payload import TensorRows
from moetrain.checkpoint.verify import problems
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import CheckpointError
from moetrain.train.checkpoint.save import Saver
from tests.support.checkpoints import SMALL, flip, payload, saved
from tests.support.training import make_run

VALUES = {"step": 7, "tokens": 70}


def tree(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def run():
    return make_run(SMALL)


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """Directory of a run with checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save_step(run, run_dir, step)
    return run_dir


def save_step(run, run_dir: Path, step: int) -> None:
    run.state.step = step
    saver = Saver(run_dir, run.mesh, CheckpointConfig(keep=2))
    saver.begin(run.state, {})
    saver.finish(required=True)


def killed_at(run, run_dir: Path, number: int) -> str | None:
    """Save step 3 in a child that kills itself at change `number`; returns that change, if it came to it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        left = count(number, -1)

        def kill(when: str, what: str, path: Path, length: int) -> None:
            if not next(left):
                os.write(writer, f"{when} {what} {path.name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with disk.observed(kill):
                save_step(run, run_dir, 3)
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        place = pipe.read()
    assert (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) == bool(place)
    return place or None


def assert_survives(run, two: Path, run_dir: Path, number: int) -> str | None:
    shutil.copytree(two, run_dir)
    place = killed_at(run, run_dir, number)
    good = [step_of(path) for path in checkpoints_of(run_dir) if next(problems(path), None) is None]
    assert good and max(good) >= 2, place
    assert len(good) == len(checkpoints_of(run_dir)), f"{place}: what counts as a checkpoint is not good"
    save_step(run, run_dir, 3)
    assert tree(run_dir) == ["step-00000002", "step-00000003"], place
    assert [error for path in checkpoints_of(run_dir) for error in problems(path)] == [], place
    shutil.rmtree(run_dir)
    return place


@pytest.mark.slow
def test_a_save_may_be_killed_at_any_kind_of_change(run, two, tmp_path):
    """Kills before and after the first change of each kind to each file."""
    shutil.copytree(two, tmp_path / "look")
    events: list[str] = []
    with disk.observed(lambda when, what, path, length: events.append(f"{when} {what} {path.name}")):
        save_step(run, tmp_path / "look", 3)
    places = {events.index(event) for event in events}
    found = {assert_survives(run, two, tmp_path / "killed", number) for number in sorted(places)}
    assert found == set(events) and len(found) >= 30


@pytest.mark.slow
def test_a_save_may_be_killed_at_every_change(run, two, tmp_path):
    for number in count():
        if assert_survives(run, two, tmp_path / "killed", number) is None:
            break
    assert number > 100


def test_files_are_on_the_disk_before_they_count(run, two, tmp_path):
    """A power failure keeps only synced data. SIGKILL cannot show that, so check the order of changes."""
    shutil.copytree(two, tmp_path / "run")
    events: list[str] = []

    def look(when: str, what: str, path: Path, length: int) -> None:
        if when == "after" and what != "write":
            events.append(f"{what} {path.name}")

    with disk.observed(look):
        save_step(run, tmp_path / "run", 3)
    grave = events[-3:-1]
    assert set(grave) == {"remove manifest.json", "remove rank-0000.safetensors"}
    assert events == [
        "create step-00000003.tmp-1", "create rank-0000.safetensors", "fsync rank-0000.safetensors",
        "create index-0000.json", "fsync index-0000.json", "create manifest.json", "fsync manifest.json",
        "remove index-0000.json", "fsync step-00000003.tmp-1", "rename step-00000003.tmp-1",
        "fsync checkpoints", "rename step-00000001", *grave, "remove step-00000001.tmp-0"]


# --- what is kept


def test_the_newest_good_ones_are_kept_and_damaged_ones_do_not_count(run, tmp_path):
    for step in range(1, 7):
        save_all(run, tmp_path, step)
    (payload(tmp_path / "checkpoints/step-00000005")).unlink()
    (tmp_path / "checkpoints/step-00000004/manifest.json").write_text("rubbish")
    (tmp_path / "checkpoints/step-00000002").rename(tmp_path / "checkpoints/step-00000002.damaged")
    assert remove_old(tmp_path, None) == [] and len(tree(tmp_path)) == 6
    assert remove_old(tmp_path, 4) == []                     # 6, 3, 1 are good
    remove_old(tmp_path, 2)
    assert tree(tmp_path) == [f"step-{step:08d}" for step in (3, 4, 5, 6)]
    save_all(run, tmp_path, 7)
    remove_old(tmp_path, 2)
    assert tree(tmp_path) == [f"step-{step:08d}" for step in (6, 7)]


def save_all(run, run_dir: Path, step: int) -> None:
    run.state.step = step
    saver = Saver(run_dir, run.mesh, CheckpointConfig(keep=None))
    saver.begin(run.state, {})
    saver.finish(required=True)


def test_leftovers_of_killed_saves_are_removed_and_nothing_else(tmp_path):
    for name in ("step-00000003.tmp-1", "step-00000003.tmp-7", "step-00000001.tmp-0", "step-00000002.damaged",
                 "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "index-0007.json").write_text("rubbish")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == ["notes", "step-00000002.damaged"]


# --- ranks put together


def item(name: str, content: bytes, shape: tuple[int, ...], first: int = 0,
         rows: int | None = None) -> TensorRows:
    return TensorRows(name, "U8", shape, first, shape[0] if rows is None else rows, memoryview(content))


def write(directory: Path, *ranks: list[TensorRows]) -> Path:
    """Write a checkpoint of step 7 from the items of some ranks."""
    temporary, final = directory / "checkpoints/step-00000007.tmp-1", directory / "checkpoints/step-00000007"
    for rank, items in enumerate(ranks):
        write_rank(temporary, rank, items, 7)
    commit(temporary, final, ranks=len(ranks), facts={}, values=VALUES)
    return final


def test_a_tensor_in_pieces_of_several_ranks_is_one_tensor(tmp_path):
    directory = write(tmp_path, [item("a", b"ab", (3, 2), 0, 1)], [item("a", b"cdef", (3, 2), 1, 2)])
    manifest = read_manifest(directory)
    assert [(chunk.file, chunk.first, chunk.rows) for chunk in manifest.entry("a").chunks] == [
        ("rank-0000.safetensors", 0, 1), ("rank-0001.safetensors", 1, 2)]


def test_two_pieces_of_a_tensor_on_one_rank_are_both_there(tmp_path):
    """torch's Hugging Face storage keeps only the last of them and reports success."""
    manifest = read_manifest(write(tmp_path, [item("a", b"ab", (3, 2), 0, 1), item("a", b"ef", (3, 2), 2, 1)],
                                   [item("a", b"cd", (3, 2), 1, 1)]))
    assert [chunk.first for chunk in manifest.entry("a").chunks] == [0, 1, 2]
    assert [part.key for part in manifest.parts()["rank-0000.safetensors"]] == ["a@0", "a@2"]


@pytest.mark.parametrize("ranks, why", [
    # A tensor that two ranks have written.
    (([item("a", b"abcd", (2, 2))], [item("a", b"efgh", (2, 2))]), "missing or there twice"),
    (([item("x.experts.0.up", b"abcd", (2, 2))], [item("x.experts.0.up", b"efgh", (2, 2))]),
     "or there twice"),
    # Rows that no rank has written.
    (([item("a", b"ab", (3, 2), 0, 1)], [item("a", b"ef", (3, 2), 2, 1)]), "rows 1 to 2 of a are missing"),
    (([item("a", b"ab", (3, 2), 0, 1)], [item("a", b"cd", (3, 2), 1, 1)]), "a has 2 rows of 3"),
    (([item("a", b"abcd", (3, 2), 0, 2)], [item("a", b"cdef", (3, 2), 1, 2)]), "missing or there twice"),
])
def test_rows_that_are_missing_or_there_twice_are_no_checkpoint(tmp_path, ranks, why):
    with pytest.raises(CheckpointError, match=why):
        write(tmp_path, *ranks)
    assert checkpoints_of(tmp_path) == []


def test_a_rank_that_has_not_written_is_no_checkpoint(tmp_path):
    temporary = tmp_path / "checkpoints/step-00000007.tmp-1"
    write_rank(temporary, 0, [item("a", b"ab", (2,))], 7)
    with pytest.raises(FileNotFoundError):
        commit(temporary, temporary.with_name("step-00000007"), ranks=2, facts={}, values=VALUES)


def test_a_file_that_changed_before_the_commit_is_no_checkpoint(tmp_path):
    temporary = tmp_path / "checkpoints/step-00000007.tmp-1"
    write_rank(temporary, 0, [item("a", b"ab", (2,))], 7)
    payload(temporary).write_bytes(payload(temporary).read_bytes() + b"c")
    with pytest.raises(CheckpointError, match="bytes long"):
        commit(temporary, temporary.with_name("step-00000007"), ranks=1, facts={}, values=VALUES)


def test_whole_experts_share_a_table_and_others_do_not(tmp_path):
    content = b"abcd"
    whole = [item(f"x.experts.{expert}.up", content, (2, 2)) for expert in (2, 0, 1)]
    some = [item(f"y.experts.{expert}.up", content, (2, 2)) for expert in (0, 2)]
    cut = [item("z.experts.0.up", content, (2, 2)), item("z.experts.1.up", b"ab", (2, 2), 0, 1),
           item("z.experts.1.up", b"cd", (2, 2), 1, 1)]
    ragged = [item("r.experts.0.up", content, (2, 2)), item("r.experts.1.up", b"ab", (1, 2))]
    manifest = read_manifest(write(tmp_path, whole, some, cut, ragged))
    assert ({name: len(table.rows) for name, table in manifest.experts.items()}
            == {"x.experts.*.up": 3, "z.experts.*.up": 1})
    assert set(manifest.tensors) == {"y.experts.0.up", "y.experts.2.up", "z.experts.1.up", "r.experts.0.up",
                                     "r.experts.1.up"}
    assert len(list(manifest.names())) == 9 and all(manifest.entry(name) for name in manifest.names())


def test_values_of_one_tensor_in_two_dtypes_are_a_mistake():
    rows = [["a", dtype, [2], 64, first, 1, 0] for first, dtype in ((0, "U8"), (1, "I8"))]
    with pytest.raises(AssertionError, match="on rank 1"):
        merge({rank: {"file": [65, 64, 0], "rows": [row]} for rank, row in enumerate(rows)}, {}, VALUES)


def test_a_checkpoint_of_the_same_step_is_replaced_only_if_it_is_damaged(tmp_path):
    directory = write(tmp_path, [item("a", b"ab", (2,))])
    write(tmp_path, [item("a", b"cd", (2,))])
    assert payload(directory).read_bytes().endswith(b"ab")
    flip(payload(directory), -1 + payload(directory).stat().st_size)
    write(tmp_path, [item("a", b"cd", (2,))])
    assert payload(directory).read_bytes().endswith(b"cd")
    assert tree(tmp_path) == ["step-00000007", "step-00000007.damaged"]


def test_a_link_is_removed_and_what_it_leads_to_stays(run, tmp_path):
    mine = tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    (mine / "deep" / "work").write_text("years of it")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("step-00000001.tmp-0", "step-00000001"):
        (checkpoints / name).symlink_to(mine, target_is_directory=True)
    remove_leftovers(tmp_path / "run")
    assert not (checkpoints / "step-00000001.tmp-0").is_symlink()
    for step in (2, 3):
        saved(run, tmp_path / "run", step)
    remove_old(tmp_path / "run", 2)
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000002", "step-00000003"]
    assert (mine / "deep" / "work").read_text() == "years of it"


def test_copies_of_checkpoints_under_other_names_are_left_alone(run, tmp_path):
    first = saved(run, tmp_path, 1)
    shutil.copytree(first, first.with_name("step-00000001-best"))
    for step in (2, 3):
        saved(run, tmp_path, step)
    assert [path.name for path in remove_old(tmp_path, 2)] == ["step-00000001"]
    assert (first.with_name("step-00000001-best") / "manifest.json").exists()

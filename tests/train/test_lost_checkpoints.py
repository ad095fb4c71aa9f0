"""A run that has saved and whose checkpoints are gone does not begin anew in silence."""

import json
import shutil
from pathlib import Path

import pytest

from moetrain.cli import checkpoint as cli
from moetrain.config.compose import compose
from moetrain.errors import CheckpointError
from moetrain.train.loop import train
from tests.support.checkpoints import SMALL
from tests.support.training import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint of each."""
    directory = tmp_path_factory.mktemp("runs") / "mine"
    go_on(directory, 3)
    return directory


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "mine"))


def go_on(directory: Path, stop_at: int) -> None:
    words = [word for word in TINY if not word.startswith(("model.", "data.vocab"))]
    train(compose([*words, *SMALL, f"run.dir={directory}", f"run.stop_at={stop_at}", "checkpoint.interval=1",
                   "checkpoint.keep=3",
                   "eval.windows=1", "eval.batch=1", "train.micro_batch=16"]))


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_saves_are_on_record(trained: Path) -> None:
    assert steps(trained / "log" / "saves.jsonl") == [1, 2, 3]


def test_without_manifests_nothing_is_good_and_verify_names_them(
        run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    for path in run_dir.glob("checkpoints/*/manifest.json"):
        path.unlink()
    with pytest.raises(CheckpointError) as refused:
        go_on(run_dir, 4)
    assert (refused.value.id == "E-CHECKPOINT-004"
            and refused.value.why.count("manifest.json: it cannot be read: No such file") == 3)
    with pytest.raises(CheckpointError, match="E-CHECKPOINT-005"):
        cli.run(["verify", str(run_dir)])
    assert capsys.readouterr().out.count("damaged") == 3
    assert steps(run_dir / "metrics.jsonl") == [1, 2, 3]


def test_without_the_newest_manifest_the_run_goes_on_from_the_one_before_and_says_so(
        run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (run_dir / "checkpoints/step-00000003/manifest.json").unlink()
    go_on(run_dir, 4)
    said = capsys.readouterr().out
    assert "step-00000003 is damaged" in said and "going on from step-00000002: 1 steps are lost" in said
    assert ((run_dir / "checkpoints/step-00000003.damaged").is_dir()
            and steps(run_dir / "metrics.jsonl") == [1, 2, 3, 4])


def test_without_its_folders_the_run_refuses_to_begin_anew_until_it_is_told(
        run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError) as refused:
        go_on(run_dir, 4)
    assert (refused.value.id == "E-CHECKPOINT-020" and "step 3 was saved" in refused.value.why
            and refused.value.code == 13)
    assert (steps(run_dir / "metrics.jsonl") == [1, 2, 3]
            and str(run_dir / "log/saves.jsonl") in refused.value.next)
    (run_dir / "log/saves.jsonl").unlink()                       # as advised
    go_on(run_dir, 1)
    assert "has taken 3 steps and has no checkpoint: it begins anew" in capsys.readouterr().out
    assert steps(run_dir / "metrics.jsonl") == [1] and steps(run_dir / "metrics.jsonl.lost") == [1, 2, 3]


def test_without_its_newest_folder_the_run_says_what_is_gone(
        run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(run_dir / "checkpoints/step-00000003")
    go_on(run_dir, 4)
    assert ("step 3 was saved and its checkpoint is gone: the run goes on from step 2"
            in capsys.readouterr().out)


def test_a_step_that_is_a_link_out_of_the_run_is_passed_over(
        run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    step = run_dir / "checkpoints/step-00000003"
    step.rename(tmp_path / "elsewhere")
    step.symlink_to(tmp_path / "elsewhere")
    go_on(run_dir, 4)
    assert "it is a link, not a directory of the run" in capsys.readouterr().out
    assert ((tmp_path / "elsewhere" / "manifest.json").is_file()
            and (run_dir / "checkpoints/step-00000003").is_dir())

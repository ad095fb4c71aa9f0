"""A word names the checkpoints of a run, or one of them."""

from pathlib import Path

import pytest

from moetrain.errors import CheckpointError, ConfigError
from moetrain.runs.named_checkpoint import named_checkpoints


def test_a_run_has_all_its_checkpoints_and_a_folder_is_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "runs/mine/checkpoints" / f"step-{step:08d}" for step in (1, 20)]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[0].parent / "step-00000003.damaged").mkdir()
    by_name, by_path = named_checkpoints("mine"), named_checkpoints(str(tmp_path / "runs/mine"))
    assert [path.name for path in by_name] == [path.name for path in folders] and by_path == folders
    assert named_checkpoints("runs/mine/checkpoints/step-00000001") == [
        Path("runs/mine/checkpoints/step-00000001")]
    (tmp_path / "runs/empty/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        named_checkpoints("empty")
    assert caught.value.id == "E-CHECKPOINT-002"
    with pytest.raises(ConfigError):
        named_checkpoints("nobody")

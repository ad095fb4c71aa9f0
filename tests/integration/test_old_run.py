"""A run whose records have old names of keys goes on like one with the new names (tests/support/old_run)."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import yaml

from moetrain.__main__ import main
from moetrain.checkpoint.manifest import read_manifest
from moetrain.config.compose import from_yaml
from moetrain.config.renamed import renaming
from moetrain.config.values import as_tree, leaves
from tests.support.command_line import files, moetrain, numbers, weights

OLD_RUN = Path(__file__).parents[1] / "support" / "old_run"


def with_new_names(folder: Path) -> None:
    """Write the config of a run and of its checkpoint as a release with the new names does."""
    config = as_tree(from_yaml(folder / "config.yaml"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (manifest,) = folder.glob("checkpoints/*/manifest.json")
    tree = json.loads(manifest.read_bytes().split(b"\n", 1)[1])
    tree["facts"]["config"] = config
    body = json.dumps(tree).encode()
    manifest.write_bytes(b"%08x\n" % zlib.crc32(body) + body)


def old_names_in(folder: Path) -> set[str]:
    """Old names of keys in config.yaml and in the newest checkpoint."""
    newest = max(folder.glob("checkpoints/*/manifest.json"))
    recorded = json.loads(newest.read_bytes().split(b"\n", 1)[1])["facts"]["config"]
    trees = (yaml.safe_load((folder / "config.yaml").read_text()), recorded)
    return {path for tree in trees for path, _ in leaves(tree) if renaming(path)}


@pytest.mark.slow
def test_a_run_with_old_names_resumes_to_the_bit_and_says_nothing_of_them(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    old, new = tmp_path / "runs" / "old", tmp_path / "runs" / "new"
    for folder in (old, new):
        shutil.copytree(OLD_RUN, folder)
    with_new_names(new)
    assert len(old_names_in(old)) == 7 and not old_names_in(new)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "old"]) == 0 and "1 layers, 16 wide, 4 experts" in capsys.readouterr().out
    said = [moetrain("train", name, "run.stop_at=null", cwd=tmp_path) for name in ("old", "new")]
    assert "resumed from step 2" in said[0]
    assert not [line for line in said[0].splitlines() if "[warn]" in line or "E-" in line]
    assert len(numbers(old)) == 4 and numbers(old) == numbers(new) and weights(old) == weights(new)
    assert not old_names_in(old)
    qkv = "layers.0.attention.qkv"
    before, after = (read_manifest(folder / "checkpoints" / f"step-{step:08d}")
                     for folder, step in ((OLD_RUN, 2), (old, 4)))
    for stored, manifest in ((qkv, before), (f"{qkv}.weight", after)):
        assert {f"model.{stored}", f"optim.{stored}.exp_avg"} <= set(manifest.tensors)
        assert {f"model.{qkv}.weight", f"optim.{qkv}.weight.exp_avg"} <= set(manifest.names())


@pytest.mark.slow
def test_a_run_with_old_names_is_evaluated_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "runs" / "old")
    evaluated = json.loads(moetrain("eval", "old", "--json", cwd=tmp_path))
    assert evaluated["step"] == 2 and 3 < evaluated["loss/mean"] < 4
    monkeypatch.chdir(tmp_path)
    assert main(["report", "old"]) == 0


def test_the_fixture_is_as_it_was_written() -> None:
    assert set(files(OLD_RUN)) == {"config.yaml", "env.json", "metrics.jsonl",
                                   "checkpoints/step-00000002/manifest.json",
                                   "checkpoints/step-00000002/rank-0000.safetensors"}
    assert len(old_names_in(OLD_RUN)) == 7

"""`moetrain inspect` and `moetrain checkpoint verify` on the checkpoints of a run, as a user calls them."""

import json
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.cli.inspect import kind
from tests.support.captured_command import moetrain
from tests.support.checkpoints import flip, payload, saved, trained


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = trained(1)
    for step in (1, 2, 3):
        saved(run, tmp_path / "run", step)
    return tmp_path / "run"


def test_inspect_shows_the_newest_of_a_run_or_the_one_that_is_named(run_dir, capsys):
    assert main(["inspect", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "step     3" in text and "others   1, 2" in text and "1 ranks" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    experts = 2 * 8 * 3 * 16 * 16
    assert rows["model, experts"][2:4] == ["32", f"{experts:,}"] == rows["optim exp_avg, experts"][3:5]
    assert rows["rank-0000.safetensors"][1] == rows["all"][1]
    assert main(["inspect", str(run_dir / "checkpoints/step-00000002")]) == 0
    assert "step     2" in capsys.readouterr().out


def test_inspect_lists_tensors_by_pattern(run_dir, capsys):
    assert main(["inspect", str(run_dir), "--tensors", "model.*experts.7.*"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [
        f"model.layers.{layer}.moe.experts.7.{matrix}" for layer in (0, 1) for matrix in ("down", "gate_up")]
    assert main(["inspect", str(run_dir), "--tensors"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100


def test_verify_says_good_for_each(run_dir, capsys):
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["good"] * 3


def test_verify_names_every_damaged_file_and_leaves_with_13(run_dir, capsys):
    flip(payload(run_dir / "checkpoints/step-00000001"), 5000)
    (run_dir / "checkpoints/step-00000003/manifest.json").write_text("rubbish")
    assert main(["checkpoint", "verify", str(run_dir)]) == 13
    out, error = capsys.readouterr()
    words = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert words == ["damaged", "good", "damaged"]
    assert "E-CHECKPOINT-005  2 of 3 checkpoints are damaged" in error
    assert "step-00000001/rank-0000.safetensors" in error and "step-00000003/manifest.json" in error
    assert main(["checkpoint", "verify", str(run_dir / "checkpoints/step-00000002")]) == 0


@pytest.mark.parametrize("argv, code", [
    (["inspect"], "E-CONFIG-053"), (["inspect", "a", "b"], "E-CONFIG-053"),
    (["inspect", "--tensors"], "E-CONFIG-053"),
    (["checkpoint", "verify"], "E-CONFIG-053"), (["checkpoint"], "E-CONFIG-042"),
    (["checkpoint", "verfy", "x"], "E-CONFIG-042"),
    (["inspect", "no-such-run"], "E-CONFIG-015"), (["checkpoint", "verify", "no-such-run"], "E-CONFIG-015"),
])
def test_mistakes_are_named(argv, code, capsys):
    assert main(argv) == 2 and code in capsys.readouterr().err


def test_a_run_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    for argv in (["inspect"], ["checkpoint", "verify"]):
        assert main([*argv, str(tmp_path)]) == 13 and "E-CHECKPOINT-002" in capsys.readouterr().err


def test_neither_needs_torch_and_numpy_reads_experts_alone(run_dir):
    for argv, heavy in ((["inspect", run_dir], ("torch", "numpy")),
                        (["checkpoint", "verify", run_dir], ("torch",))):
        done = moetrain(*map(str, argv), cwd=run_dir, python=("-X", "importtime"))
        assert done.returncode == 0 and done.stdout
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
                   if line.startswith("import time:")}
        assert not {name for name in modules if name.split(".")[0] in heavy}


def test_foreign_facts_do_not_stop_inspect(run_dir, capsys):
    """facts are free: other versions write other ones."""
    from moetrain.checkpoint.manifest import NAME, read_manifest

    directory = run_dir / "checkpoints/step-00000003"
    manifest = read_manifest(directory)
    for facts in ({}, {"time": "x", "mesh": 3, "config": []},
                  json.loads('{"config": {"model": {"dim": 5}}}')):
        manifest.facts = facts
        (directory / NAME).write_bytes(manifest.encode())
        assert main(["inspect", str(directory)]) == 0
    assert "5 wide" in capsys.readouterr().out


def test_kinds():
    assert kind("model.layers.0.moe.experts.3.down") == "model, experts"
    assert kind("optim.embed.exp_avg") == "optim exp_avg, dense"
    assert kind("buffer.layers.0.moe.router.bias") == "buffer, dense"

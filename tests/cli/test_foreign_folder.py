"""`moetrain inspect` and `moetrain checkpoint verify` on folders of other programs, as a user calls them."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from moetrain.__main__ import main
from tests.support.captured_command import moetrain
from tests.support.checkpoints import saved, trained


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"layers.{layer}.moe.experts.w1": torch.randn(4, 6, 8) for layer in range(2)}
    return tensors | {f"layers.{layer}.moe.router.gate.weight": torch.randn(4, 8) for layer in range(2)}


def dcp_folder(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    dcp.save(dict(tensors, step=3), checkpoint_id=path, no_dist=True)
    return path


def test_inspect_lists_experts_by_layer_and_tensors(tmp_path, capsys):
    folder = str(dcp_folder(tmp_path / "titan", weights()))
    assert main(["inspect", folder]) == 0
    text = capsys.readouterr().out
    assert "torch DCP" in text and "tensors  4, 1.792 kB" in text and "1 values that are no tensors" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("layers.")][:2] == [
        ["layers.0.moe", "4"], ["layers.1.moe", "4"]]
    assert "w1 [6, 8]: 192 B each" in text
    assert main(["inspect", folder, "--tensors", "*.0.*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "layers.0.moe.experts.w1", "layers.0.moe.router.gate.weight"]


def test_verify_says_whether_every_expert_is_there(tmp_path, capsys):
    tensors = weights()
    assert main(["checkpoint", "verify", str(dcp_folder(tmp_path / "sound", tensors))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("good")
    assert "layers.0.moe to layers.1.moe (2 layers): 4 experts, all different" in out
    tensors["layers.1.moe.experts.w1"] = tensors["layers.1.moe.experts.w1"][:2].clone()
    tensors["layers.0.moe.experts.w1"][2] = tensors["layers.0.moe.experts.w1"][0]
    assert main(["checkpoint", "verify", str(dcp_folder(tmp_path / "lost", tensors))]) == 13
    out, error = capsys.readouterr()
    assert out.startswith("damaged") and "E-CHECKPOINT-035  the experts of 2 layers" in error
    assert "layers.0.moe: experts 0, 2 are equal to each other, byte for byte" in error
    assert "chooses from 4 experts, and 2 are there: experts 2, 3 are missing" in error


def test_verify_reads_folders_of_hugging_face_and_their_config(tmp_path, capsys):
    save_file({f"model.layers.0.mlp.experts.{expert}.up_proj.weight": torch.full((2, 2), expert + 1.0)
               for expert in range(3)}, tmp_path / "model.safetensors")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert "not seen: no router and no config.json" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 4}))
    assert main(["checkpoint", "verify", str(tmp_path)]) == 13
    assert "config.json speaks of 4 experts, and 3 are there" in capsys.readouterr().err


def test_an_altered_value_is_damage(tmp_path, capsys):
    folder = dcp_folder(tmp_path / "altered", weights())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items()
                 if index.fqn == "layers.0.moe.experts.w1")
    data = bytearray((folder / place.relative_path).read_bytes())
    data[place.offset + 900] ^= 1                        # among the 768 bytes of values
    (folder / place.relative_path).write_bytes(data)
    assert main(["checkpoint", "verify", str(folder)]) == 13
    error = capsys.readouterr().err
    assert "E-CHECKPOINT-032" in error and "layers.0.moe.experts.w1 at [0, 0, 0] does not match" in error


def test_nothing_is_run_and_no_torch_is_imported(tmp_path):
    folder = dcp_folder(tmp_path / "one", weights())
    for argv in (["inspect", folder], ["checkpoint", "verify", folder]):
        done = moetrain(*map(str, argv), cwd=tmp_path, python=("-X", "importtime"))
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert done.returncode == 0 and not modules & {"torch", "pickle._loads"}
    canary = tmp_path / "canary"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = _Planted(f"open({str(canary)!r}, 'w').close()")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for argv in (["inspect", folder], ["checkpoint", "verify", folder]):
        done = moetrain(*map(str, argv), cwd=tmp_path)
        assert done.returncode == 13 and "E-CHECKPOINT-031" in done.stderr and "builtins.exec" in done.stderr
    assert not canary.exists()


class _Planted:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def test_experts_of_our_own_that_are_equal_are_said_and_no_damage(tmp_path, capsys):
    run = trained(1)
    rows = {shard.name: shard.rows for shard in run.state.state_shards()}
    with torch.no_grad():
        for matrix in ("gate_up", "down"):
            rows[f"model.layers.0.moe.experts.3.{matrix}"].copy_(rows[f"model.layers.0.moe.experts.1.{matrix}"])
    saved(run, tmp_path / "run", 1)
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.moe: experts 1, 3 are equal to each other, byte for byte" in out


@pytest.mark.parametrize("verb", [["inspect"], ["checkpoint", "verify"]])
def test_a_folder_that_is_no_checkpoint_is_none(verb, tmp_path, capsys):
    assert main([*verb, str(tmp_path)]) == 2 and "E-CONFIG-015" in capsys.readouterr().err

"""Folders of stock transformers as runs of ours and back, tensor by tensor; and folders that do not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetrain.errors import CheckpointError
from moetrain.interop.huggingface.exporting import export_weights
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.folder import HuggingFaceFolder, open_folder
from moetrain.interop.huggingface.folder_writer import FolderWriter
from moetrain.interop.huggingface.importing import PRESERVED, import_folder
from moetrain.transform.reader import open_weights
from tests.support.public_models import run_config, stock, to_ours

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return stock("mixtral", tmp_path_factory.mktemp("mixtral"), torch.bfloat16)


def copied(theirs, out: Path, change=lambda tensors, config: None) -> Path:
    """A copy of a folder, with changes."""
    tensors, config = dict(theirs.tensors), dict(theirs.config)
    change(tensors, config)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return out


def imported(directory: Path, out: Path, theirs) -> Path:
    with open_folder(directory) as folder:
        return import_folder(folder, out, family=FAMILIES["mixtral"], config=run_config(theirs.config))


def exported(run: Path, out: Path, preserved: HuggingFaceFolder | None = None) -> dict[str, torch.Tensor]:
    with open_weights(run) as reader, FolderWriter(out, 4000) as writer:
        account = export_weights(
            reader, FAMILIES["mixtral"], writer, dtype=torch.bfloat16, preserved=preserved)
    found = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert set(account.written) | set(account.preserved) == found.keys()
    return found


def test_import_then_export_gives_the_same_bits(tmp_path, mixtral):
    """In float32 here and bfloat16 there; what has no counterpart comes along as it is."""
    inverse = torch.randn(4)

    def with_frequencies(tensors, config):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = inverse

    folder, run = copied(mixtral, tmp_path / "theirs", with_frequencies), tmp_path / "run"
    imported(folder, run, mixtral)
    with open_weights(run) as reader:
        wanted = to_ours(run_config(mixtral.config), mixtral.tensors, "mixtral")
        assert {name for name, _ in reader} == wanted.keys()
        for name, tensor in reader:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[name].float()), name
    with HuggingFaceFolder(run / PRESERVED, {}) as preserved:
        found = exported(run, tmp_path / "back", preserved)
    there, back = (json.loads((path / "transform.json").read_text()) for path in (run, tmp_path / "back"))
    assert there["rule"] == {"name": "import", "family": "mixtral"} and there["expected"] == "exact"
    assert there["sources"][0]["path"] == str(folder) and back["expected"] == "approximate"
    with open_weights(run) as reader:
        assert back["sources"][0]["digest"] == reader.digest
    before = mixtral.tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": inverse}
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) and found[name].dtype == before[name].dtype
               for name in before)


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"


def without_expert(tensors, config):
    del tensors[EXPERT.format(3)]


def one_expert_more(tensors, config):
    tensors[EXPERT.format(4)] = tensors[EXPERT.format(3)].clone()


def another_shape(tensors, config):
    tensors[EXPERT.format(3)] = tensors[EXPERT.format(3)].T.contiguous()


@pytest.mark.parametrize("change, said", [
    (without_expert, "layers.1.block_sparse_moe.experts.3.w2.weight: not there"),
    (one_expert_more, "layers.1.block_sparse_moe.experts.4.w2.weight: mixtral"),
    (another_shape, r"experts.3.w2.weight is \[24, 16\], and its config.json says \[16, 24\]")])
def test_folders_that_do_not_fit_their_config_leave_nothing_behind(tmp_path, mixtral, change, said):
    folder = copied(mixtral, tmp_path / "theirs", change)
    with pytest.raises(CheckpointError, match=said):
        imported(folder, tmp_path / "run", mixtral)
    assert not (tmp_path / "run").exists()


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path, mixtral):
    config = run_config(mixtral.config)
    config = replace(config, model=replace(config.model, tie_embeddings=True))
    with open_folder(copied(mixtral, tmp_path / "theirs")) as folder:
        with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
            import_folder(folder, tmp_path / "run", family=FAMILIES["mixtral"], config=config)
    assert not (tmp_path / "run").exists()

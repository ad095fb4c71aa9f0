"""Models of transformers in DCP folders, as the importer reads them."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from moetrain.errors import CheckpointError
from moetrain.interop.dcp.as_huggingface import open_dcp

CONFIG = {"model_type": "mixtral"}


NAMES = ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj",
         "model.layers.2.norm.weight", "model.layers.10.norm.weight")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(3, 4).to(torch.bfloat16 if "experts" in name else torch.float32)
            for name in reversed(NAMES)}


def saved(folder: Path, state: dict[str, object]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("key, wrap", [("", lambda name: name), ("state.app.model.", lambda name: name), (
    "model.", lambda name: "_orig_mod." + name.replace("0.mlp", "0._checkpoint_wrapped_module.mlp"))])
def test_names_are_those_of_the_family_whatever_wraps_the_model(tmp_path, key, wrap):
    state = {key + wrap(name): tensor for name, tensor in tensors().items()}
    state |= {"optim.exp_avg": torch.ones(3), "step": 3} if key else {}
    with open_dcp(saved(tmp_path, state), CONFIG) as folder:
        assert folder.config == CONFIG and folder.size == 4 * 3 * 4 * 4 + 3 * 4 * 2
        assert folder.names == list(NAMES)
        for name, tensor in tensors().items():
            assert folder.shape(name) == (3, 4) and torch.equal(folder[name], tensor)
            assert folder[name].dtype == tensor.dtype and torch.equal(folder.rows(name, 1, 1), tensor[1:2])


def test_a_model_of_transformers_is_ours_as_from_its_own_folder(tmp_path):
    """Its state has the experts of a layer in one tensor, its folder each by itself."""
    pytest.importorskip("transformers")
    from tests.support.public_models import FAMILIES, stock, to_ours

    model = stock("mixtral", tmp_path / "public")
    saved(tmp_path / "dcp", {"model": model.model.state_dict(), "step": 5})
    config = FAMILIES["mixtral"].bare_config(model.config)
    with open_dcp(tmp_path / "dcp", model.config) as folder:
        ours = to_ours(config, dict(folder), "mixtral")
    expected = to_ours(config, model.tensors, "mixtral")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def fault(folder: Path, config: object = CONFIG) -> str:
    with pytest.raises(CheckpointError) as error:
        open_dcp(folder, config)
    return str(error.value)


def test_other_names_are_refused_with_what_is_there(tmp_path):
    text = fault(saved(tmp_path, {"tok_embeddings.weight": torch.ones(5, 2), "layers.0.wq": torch.ones(2)}))
    assert "E-CHECKPOINT-048" in text and "tok_embeddings.weight [5, 2]" in text
    two = {f"{key}.model.embed_tokens.weight": torch.ones(2) for key in ("student", "teacher")}
    assert "2 tensors end in" in fault(saved(tmp_path / "two", two))
    twice = {"_orig_mod.lm_head.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    assert "E-CHECKPOINT-047" in fault(saved(tmp_path / "twice", twice))


def test_the_config_lies_in_the_folder_or_is_missed(tmp_path):
    folder = saved(tmp_path, tensors())
    assert "E-CHECKPOINT-046" in fault(folder, None)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with open_dcp(folder) as opened:
        assert opened.config == CONFIG

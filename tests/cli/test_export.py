"""`moetrain export` and `import`: a run as a folder that stock transformers loads, and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.__main__ import main
from moetrain.checkpoint.digest import weights_digest
from moetrain.checkpoint.manifest import checkpoints_of, read_manifest
from moetrain.config.compose import from_yaml
from tests.support.trained_run import corpus, train

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/mine, trained for three steps, and its export `out`."""
    folder = tmp_path_factory.mktemp("export")
    corpus(folder / "corpus")
    train(folder, "router.weights=renorm", "model.qk_norm=head")
    (folder / "runs/mine/report").mkdir()
    for name in ("loss.png", "expert_load.png"):                 # as the end of training draws them
        (folder / "runs/mine/report" / name).write_bytes(name.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["export", "mine", "out=out", "shard_size=100KB"]) == 0
        assert main(["import", "out", "out=back"]) == 0
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """What a command prints that ends with this code."""
    capsys.readouterr()
    assert main(list(words)) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def test_transformers_loads_the_folder_and_continues_texts_alike(
        here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("letters 7").input_ids]])   # as generate begins
    theirs = tokenizer.decode(model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1]:])
    ours = said(capsys, 0, "generate", "mine", "generate.prompt=letters 7", "generate.tokens=7",
                "generate.temperature=0", "--json")
    assert json.loads(ours)["text"] == theirs


def test_the_check_lies_in_the_folder(here: Path) -> None:
    check = json.loads(Path("out/export_check.json").read_text())
    assert check["family"] == "qwen3_moe" and check["logits"]["text"] == "held-out text of the run"
    assert check["logits"]["max_abs_delta"] < 1e-5 and check["versions"]["transformers"]
    names = read_manifest(checkpoints_of(Path("runs/mine"))[-1]).names()
    assert check["tensors"]["read"] == sum(name.startswith("model.") for name in names)
    assert check["tensors"]["files"] == len(list(Path("out").glob("*.safetensors"))) > 1


def test_the_card_shows_run_and_pictures(here: Path) -> None:
    card = Path("out/README.md").read_text()
    assert all(f"## {title}" in card for title in (
        "Load it", "Sizes", "Data and training", "Figures", "Balance", "Checked when it was written"))
    assert "held-out loss, letters" in card and str(here) not in card
    for picture in ("loss.png", "expert_load.png"):
        assert f"({picture})" in card and Path("out", picture).read_text() == picture


def test_there_and_back_is_the_same_to_the_bit(here: Path) -> None:
    mine, back = (checkpoints_of(Path("runs", name))[-1] for name in ("mine", "back"))
    assert weights_digest(read_manifest(back)) == weights_digest(read_manifest(mine))
    assert main(["export", "back", "out=again", "shard_size=100KB", "verify=false"]) == 0
    for path in Path("out").iterdir():
        if path.name not in ("README.md", "export_check.json", "transform.json") and path.suffix != ".png":
            assert Path("again", path.name).read_bytes() == path.read_bytes(), path.name


def test_an_imported_run_is_used_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "8 experts" in said(capsys, 0, "inspect", "back")
    assert json.loads(said(capsys, 0, "generate", "back", "generate.tokens=2", "--json"))["tokens"] <= 2
    assert "E-DATA-180" in said(capsys, 12, "eval", "back")
    assert json.loads(said(capsys, 0, "eval", "back", "data.path=corpus", "eval.windows=1", "--json"))
    shutil.copytree("runs/back", "moved/back")                # the path of its tokenizer is another now
    shutil.rmtree("runs/back/huggingface")
    try:
        assert said(capsys, 0, "generate", "moved/back", "generate.tokens=2")
    finally:
        shutil.copytree("moved/back/huggingface", "runs/back/huggingface")


def test_a_model_without_a_tokenizer_takes_the_one_that_is_typed(
        here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("out", "bare", ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    assert main(["import", "bare", "out=ids"]) == 0
    assert "data.tokenizer=" in said(capsys, 12, "eval", "ids", "data.path=corpus")
    with_bytes = said(capsys, 0, "eval", "ids", "data.path=corpus", "data.tokenizer=bytes", "eval.windows=1",
                      "--json")
    as_trained = said(capsys, 0, "eval", "back", "data.path=corpus", "eval.windows=1", "--json")
    found, wanted = (json.loads(text) for text in (with_bytes, as_trained))
    assert found["nats_per_byte/mean"] == pytest.approx(wanted["nats_per_byte/mean"], rel=1e-5)
    assert said(capsys, 0, "generate", "ids", "data.tokenizer=bytes", "generate.tokens=2")


def test_training_goes_on_with_its_model_and_tokenizer(
        here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.cli.train.draw", lambda directory: None)
    told = said(capsys, 0, "train", "init.from=back", "data.path=corpus", "run.name=next", "run.steps=1",
                "train.seq_len=16", "train.global_batch=4", "run.device=cpu", "log.wandb=off")
    assert "its model, router, expert, tokenizer" in told
    back, own = (from_yaml(Path("runs", name, "config.yaml")) for name in ("back", "next"))
    assert own.model == back.model and own.data.tokenizer == back.data.tokenizer
    assert main(["export", "next", "out=trained", "verify=false"]) == 0
    assert Path("trained/tokenizer.json").read_bytes() == Path("out/tokenizer.json").read_bytes()
    assert (json.loads(Path("trained/config.json").read_text())
            == json.loads(Path("out/config.json").read_text()))


def test_rounding_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(said(capsys, 0, "export", "mine", "out=half", "dtype=bfloat16", "--json"))
    assert record["logits"]["max_abs_delta"] < 1e-5 < record["logits"]["max_abs_delta_of_rounding"]
    assert json.loads(Path("half/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("words, code, says", [
    (["export", "mine"], 2, "E-CONFIG-319"),
    (["export", "mine", "out=out"], 2, "E-CONFIG-322"),
    (["export", "mine", "out=new", "familly=mixtral"], 2, "family=mixtral"),
    (["export", "mine", "out=new", "family=mixtral"], 2, "model.qk_norm"),
    (["export", "mine", "out=new", "dtype=fp16"], 2, "E-CONFIG-318"),
    (["export", "mine", "out=new", "shard_size=big"], 2, "E-CONFIG-318"),
    (["export", "gone", "out=new"], 2, "E-CONFIG-015"),
    (["import", "out", "out=mine"], 2, "E-CONFIG-322"),
    (["import", "out"], 2, "E-CONFIG-319"),
    (["import", "corpus", "out=new"], 13, "E-CHECKPOINT-"),
])
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
        here: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str) -> None:
    before = sorted(Path().rglob("*"))
    assert says in said(capsys, code, *words)
    assert sorted(Path().rglob("*")) == before


def test_a_folder_that_computes_something_else_is_not_left_behind(
        here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moetrain.interop.huggingface import exporting

    added = exporting.FolderWriter.add

    def swapped(self: Any, name: str, tensor: torch.Tensor) -> None:
        added(self, name, tensor.flip(0) if name.endswith("q_norm.weight") else tensor)

    monkeypatch.setattr(exporting.FolderWriter, "add", swapped)
    monkeypatch.setattr("moetrain.interop.huggingface.logits_check.TOLERANCE", 1e-6)
    assert "E-CHECKPOINT-051" in said(capsys, 13, "export", "mine", "out=new")
    assert not list(Path().glob("*new*"))

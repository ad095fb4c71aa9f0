"""init.from on the command line: what is recorded, what resumes, and what is refused before ranks join."""

import shutil
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.checkpoint.digest import weights_digest
from moetrain.checkpoint.manifest import checkpoints_of, read_manifest
from moetrain.config.compose import compose, from_yaml
from moetrain.train import session
from moetrain.train.initial_weights import with_initial_weights
from tests.support.trained_run import SMALL, corpus, train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/mine, trained for three steps."""
    folder = tmp_path_factory.mktemp("initial")
    corpus(folder / "corpus")
    train(folder)
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder of its own."""
    for folder in ("runs", "corpus"):
        shutil.copytree(place / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int,
            *words: str) -> str:
    """What a command prints that is refused with this code before ranks join."""
    def joined(*arguments: object) -> None:
        raise AssertionError("the ranks have joined")

    with monkeypatch.context() as patch:
        patch.setattr(session, "join", joined)
        assert main(["train", *SMALL, "data.path=corpus", "run.name=next", *words]) == code
    assert not checkpoints_of(Path("runs/next"))
    return capsys.readouterr().err


@pytest.mark.parametrize("named", ["mine", "runs/mine", "runs/mine/checkpoints/step-00000003"])
def test_a_word_names_a_run_or_a_checkpoint(here: Path, named: str) -> None:
    config = with_initial_weights(compose([*SMALL, f"init.from={named}"]), Path("runs/next"))
    source = here / "runs/mine/checkpoints/step-00000003"
    assert (config.init.from_, config.init.digest) == (str(source), weights_digest(read_manifest(source)))


def test_a_resumed_run_goes_on_with_its_own_checkpoint(
        here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(here, "run.name=next", "init.from=mine", "run.steps=3", "run.stop_at=2")
    assert "from runs/mine/checkpoints/step-00000003, digest" in capsys.readouterr().out
    init = from_yaml(Path("runs/next/config.yaml")).init
    assert init.from_ and read_manifest(checkpoints_of(Path("runs/next"))[-1]).facts["config"]["init"] == {
        "from": init.from_, "digest": init.digest}
    shutil.rmtree("runs/mine/checkpoints")                        # not read again
    train(here, "run.name=next", "init.from=mine", "run.steps=3")
    assert "its own checkpoint goes on" in capsys.readouterr().out
    assert from_yaml(Path("runs/next/config.yaml")).init == init
    assert read_manifest(checkpoints_of(Path("runs/next"))[-1]).values["step"] == 3


def test_every_tensor_that_differs_is_named(here: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    text = refused(capsys, monkeypatch, 2, "init.from=mine", "model.expert_dim=48", "model.qk_norm=head")
    assert "E-CONFIG-223" in text and "runs/mine/config.yaml" in text
    for layer in (0, 1):
        assert f"model.layers.{layer}.moe.experts.*.down: expected F32 [32, 48], found F32 [32, 64]" in text
        assert f"model.layers.{layer}.attention.q_norm.weight: expected F32 [8], found none" in text
    text = refused(capsys, monkeypatch, 2, "init.from=mine", "model.moe_layers=every_2")
    assert "model.layers.0.moe.router.weight: expected no such tensor, found F32 [8, 32]" in text
    assert "model.layers.0.ffn.down.weight: expected F32 [32, 128], found none" in text


@pytest.mark.parametrize("words, code, says", [
    (["init.from=none-of-that-name"], 2, "E-CONFIG-015"),
    (["init.from=mine", "init.digest=abc"], 2, "E-CONFIG-224"),
    (["init.digest=abc"], 2, "E-CONFIG-100"),
    (["init.from="], 2, "E-CONFIG-101"),
])
def test_what_names_no_weights_is_refused(here: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch, words: list[str], code: int,
                                          says: str) -> None:
    assert says in refused(capsys, monkeypatch, code, *words)


def test_padding_of_the_source_is_advised(here: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    train(here, "run.name=padded", "model.vocab_size=264", "run.steps=1")
    text = refused(capsys, monkeypatch, 2, "init.from=padded")
    assert "model.embed: expected F32 [257, 32], found F32 [264, 32]" in text and "vocab_size=264" in text


def test_damaged_weights_are_13(here: Path, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    payload = here / "runs/mine/checkpoints/step-00000003/rank-0000.safetensors"
    content = payload.read_bytes()
    payload.write_bytes(content[:-8])
    assert "E-CHECKPOINT-001" in refused(capsys, monkeypatch, 13, "init.from=mine")
    entry = read_manifest(payload.parent).entry("model.layers.1.moe.experts.3.down")
    begin = entry.chunks[0].begin                                 # found by its checksum, when it is read
    payload.write_bytes(content[:begin] + bytes([content[begin] ^ 1]) + content[begin + 1:])
    assert main(["train", *SMALL, "data.path=corpus", "run.name=next", "init.from=mine"]) == 13
    said = capsys.readouterr().err
    assert "model.layers.1.moe.experts.3.down" in said and "does not match its checksum" in said
    shutil.rmtree(here / "runs/mine/checkpoints")
    assert "E-CHECKPOINT-002" in refused(capsys, monkeypatch, 13, "init.from=mine")


def test_float64_begins_from_float32_and_not_the_other_way(
        here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(here, "run.name=wide", "init.from=mine", "run.dtype=float64", "run.steps=1")
    text = refused(capsys, monkeypatch, 2, "init.from=wide")
    assert "model.embed: expected F32 [257, 32], found F64 [257, 32]" in text and "run.dtype=float64" in text

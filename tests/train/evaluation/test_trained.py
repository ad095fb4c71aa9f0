"""Evaluation and generation use data and tokenizer of the checkpoint, whatever lies at data.path now."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import ByteLevelBPETokenizer

from moetrain.__main__ import main
from moetrain.config.compose import for_run
from moetrain.train.evaluation.trained import choose_tokenizer, load_trained
from tests.support.trained_run import WORDS, corpus, files, losses, records, train

Folder = Path


def _tokenizer(path: Path, mark: str) -> None:
    """One of 300 ids whose file has the same size for every mark of one letter."""
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([" ".join(WORDS)] * 9, vocab_size=300,
                                special_tokens=[f"<|endoftext|>{mark}", "<|endoftext|>"])
    library.save(str(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Folders with a corpus and a run on it: by bytes, and by a tokenizer.json."""
    found = {}
    for name in ("bytes", "tokenizer"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        corpus(folder / "corpus")
        _tokenizer(folder / "tokenizer.json", "a")
        train(folder, *["data.tokenizer=tokenizer.json"] * (name == "tokenizer"))
    return found


@pytest.fixture(params=["bytes", "tokenizer"])
def folder(request: pytest.FixtureRequest, trained: dict[str, Folder], tmp_path: Path,
           monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change. The record of the run names its data where it was trained, in the fixture."""
    shutil.copytree(trained[request.param], tmp_path / "here", symlinks=True)
    config = tmp_path / "here/runs/mine/config.yaml"
    config.write_text(config.read_text().replace(str(trained[request.param]), str(tmp_path / "here")))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# One of the two is enough where the tokenizer makes no difference.
by_bytes, by_tokenizer = (pytest.mark.parametrize("folder", [name], indirect=True)
                          for name in ("bytes", "tokenizer"))


def evaluated(run: str = "mine", *words: str) -> dict[str, float]:
    directory = Path("runs", run) if Path("runs", run).exists() else Path(run)
    count = len(records(directory))
    assert main(["eval", run, *words]) == 0
    assert len(records(directory)) == count + 1
    return losses(records(directory)[-1])


def by_training(directory: Path) -> dict[str, float]:
    return losses(next(record for record in records(directory) if "command" not in record))


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(list(words)) == 12
    return capsys.readouterr().err


@by_tokenizer
def test_a_source_that_has_changed_is_not_looked_at(folder):
    """D8: it was prepared again, and a quarter of what was held out then had been trained on."""
    before = files(folder / "runs/mine/data")
    corpus(folder / "more", documents=20, seed=1).rename(folder / "corpus/more")
    assert evaluated() == by_training(folder / "runs/mine")
    shutil.rmtree(folder / "corpus")
    assert evaluated() == by_training(folder / "runs/mine")
    assert files(folder / "runs/mine/data") == before


def test_a_run_that_has_moved_finds_its_data_inside_itself(folder, tmp_path, monkeypatch, capsys):
    """D9. Typed elsewhere, with the source gone."""
    shutil.move(folder / "runs/mine", tmp_path / "moved")
    shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path)
    assert evaluated("moved") == by_training(tmp_path / "moved")
    assert main(["generate", "moved", "generate.prompt=the cat ", "generate.tokens=5"]) == 0
    assert "the cat " in capsys.readouterr().out


def test_another_tokenizer_in_the_place_of_the_trained_one_is_not_read(folder, capsys):
    """The file has the same size. What was prepared keeps a copy."""
    words = ["generate", "mine", "generate.prompt=the cat sat", "generate.tokens=9"]
    main(words)
    before = capsys.readouterr().out
    size = (folder / "tokenizer.json").stat().st_size
    _tokenizer(folder / "tokenizer.json", "b")
    assert (folder / "tokenizer.json").stat().st_size == size
    assert main(words) == 0 and capsys.readouterr().out == before
    assert evaluated() == by_training(folder / "runs/mine")
    assert "E-DATA-172" in refused(capsys, "eval", "mine", "data.tokenizer=tokenizer.json")
    assert "E-DATA-172" in refused(capsys, *words, "data.tokenizer=tokenizer.json")


@by_bytes
def test_data_that_was_removed_is_made_again_where_its_source_is_the_same(folder, capsys):
    held = by_training(folder / "runs/mine")
    shutil.move(folder / "runs/mine/data", folder / "kept")
    assert evaluated("mine", "data.cache=kept") == held
    assert not (folder / "runs/mine/data").exists()
    assert evaluated() == held
    shutil.rmtree(folder / "runs/mine/data")
    (folder / "corpus/notes/new.txt").write_text("something new")
    assert "E-DATA-171" in refused(capsys, "eval", "mine")
    assert [name for name in files(folder / "runs/mine/data") if "tokens" in name] == []
    shutil.rmtree(folder / "corpus")
    assert "E-DATA-170" in (said := refused(capsys, "eval", "mine")) and "data.cache=<" in said


def test_a_tokenizer_is_believed_by_its_content_where_the_data_is_gone(folder, capsys):
    shutil.rmtree(folder / "runs/mine/data")
    shutil.rmtree(folder / "corpus")
    words = ["generate", "mine", "generate.tokens=3"]
    assert main(words) == 0
    (folder / "tokenizer.json").write_bytes(
        (folder / "tokenizer.json").read_bytes().replace(b"<|endoftext|>a", b"<|endoftext|>b"))
    if "bytes" not in yaml.safe_load((folder / "runs/mine/config.yaml").read_text())["data"]["tokenizer"]:
        assert "E-DATA-172" in refused(capsys, *words)


def test_the_record_of_a_run_holds_absolute_paths(trained):
    for name, folder in trained.items():
        manifest = next(
            (folder / "runs/mine/checkpoints").glob("*/manifest.json")).read_text().split("\n", 1)[1]
        for recorded in (yaml.safe_load((folder / "runs/mine/config.yaml").read_text()),
                         json.loads(manifest)["facts"]["config"]):
            tokenizer = "bytes" if name == "bytes" else str(folder / "tokenizer.json")
            assert ((recorded["data"]["path"], recorded["data"]["tokenizer"])
                    == (str(folder / "corpus"), tokenizer))


def test_prepared_tokens_are_those_of_the_record_or_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (prepared,) = [path for path in (trained["bytes"] / "runs/mine/data").iterdir() if path.is_dir()]
    shutil.copytree(prepared, tmp_path / "tokens")
    train(tmp_path, "data=tokens", "data.path=tokens", "~data.tokenizer")
    assert evaluated() == by_training(tmp_path / "runs/mine")
    shutil.rmtree(tmp_path / "tokens")
    assert "E-DATA-170" in refused(capsys, "eval", "mine")
    (other,) = [path for path in (trained["tokenizer"] / "runs/mine/data").iterdir() if path.is_dir()]
    shutil.copytree(other, tmp_path / "tokens")
    assert "E-DATA-171" in refused(capsys, "eval", "mine")


@pytest.mark.parametrize("marks", [True, False])
def test_a_text_begins_as_those_that_were_trained_on(marks, tmp_path, monkeypatch, capsys):
    """Where no document of foreign token files ends in the end token, texts begin with the prompt."""
    monkeypatch.chdir(tmp_path)
    documents = [f"{number}: the cat sat on a mat ".encode() * 9 for number in range(20)]
    np.array([id for text in documents for id in [*text, *[256] * marks]], "<u2").tofile("train.bin")
    train(tmp_path, "data=memmap", "data.path=train.bin", "data.tokenizer=bytes", "data.dtype=uint16")
    run = load_trained(for_run(["mine"]))
    assert choose_tokenizer(run, for_run(["mine"]), frozenset()).end_id == (256 if marks else None)
    assert main(["generate", "mine", "generate.prompt=the", "generate.tokens=4"]) == 0
    capsys.readouterr()
    assert main(["generate", "mine", "generate.tokens=4"]) == (0 if marks else 12)
    assert marks or "E-DATA-179" in capsys.readouterr().err


def test_a_run_on_ids_alone_writes_with_the_tokenizer_that_is_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.array([*b"the cat sat on a mat ", 256] * 60, "<u2").tofile("train.bin")
    train(tmp_path, "data=memmap", "data.path=train.bin", "data.dtype=uint16", "data.vocab_size=257",
          "data.end_token=256")
    assert main(["generate", "mine"]) == 2 and "E-CONFIG-045" in capsys.readouterr().err
    assert main(["generate", "mine", "data.tokenizer=bytes", "generate.tokens=4"]) == 0
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([" ".join(WORDS)] * 9, vocab_size=300, special_tokens=["<|endoftext|>"])
    library.save("larger.json")
    assert "E-DATA-175" in refused(capsys, "generate", "mine", "data.tokenizer=larger.json",
                                   "data.end_token=null")


@by_bytes
def test_generation_reads_no_data_and_prints_one_object_when_asked(folder, capsys):
    assert "E-DATA-178" in refused(capsys, "generate", "mine", "data.path=another")
    assert main(["generate", "mine", "--json", "generate.prompt=字 the ", "generate.tokens=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "字 the " and found["step"] == 3 and (found["tokens"] == 4 or found["ended"])

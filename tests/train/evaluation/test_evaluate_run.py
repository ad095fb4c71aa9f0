"""Other data is measured whole, with the run's tokenizer and mask; its overlap with training is reported."""

import json
import shutil
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.config.compose import for_run, typed_keys
from moetrain.report.loss import read_losses
from moetrain.runs.files import JsonlSink
from moetrain.train.evaluation.evaluate_run import Evaluated, data_keys, evaluate_run
from moetrain.train.evaluation.trained import load_trained, trained_dataset
from tests.support.trained_run import corpus, files, losses, records, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    corpus(folder / "corpus")
    train(folder, "data.mask_documents=true", "data.weights={notes: 2}")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def evaluated(*words: str) -> Evaluated:
    return evaluate_run(for_run(["mine", *words]), typed_keys(["mine", *words]))


def text_of(dataset) -> bytes:
    """All that is measured, documents without their end marks."""
    stream = dataset.heldout_stream
    return bytes(id for id in stream.read(0, stream.size).tolist() if id < 256)


def test_a_file_that_is_typed_is_measured_whole(folder):
    text = "Some other text, which nobody has trained on. " * 60
    (folder / "test.txt").write_text(text)
    before = files(folder / "runs/mine/data")
    found = evaluated("data.path=test.txt")
    assert text_of(found.dataset) == text.encode() and found.dataset.train_stream.size == 0
    assert found.typed == str(folder / "test.txt") and found.overlap.value == 0
    few = evaluated("data.path=test.txt", "eval.windows=2")
    assert (few.windows, found.windows) == (2, 4096) and few.losses != found.losses
    before.pop("sources.json")
    assert before.items() <= files(folder / "runs/mine/data").items()


def test_a_folder_with_splits_or_held_out_text_is_measured_whole_too(folder):
    for split in ("train", "valid", "test"):
        (folder / "other" / split).mkdir(parents=True)
        (folder / "other" / split / "a.txt").write_text(f"This is the {split} text. " * 9)
    size = sum(path.stat().st_size for path in (folder / "other").rglob("*.txt"))
    for key in ("data.path", "data.held_out"):
        assert len(text_of(evaluated(f"{key}=other").dataset)) == size


def test_the_overlap_is_the_share_of_places_that_were_trained_on(folder):
    """Against a look-up by hand, of 32 bytes every 16, in the documents that were trained on."""
    stream = trained_dataset(load_trained(for_run(["mine"]))).train_stream
    ids = stream.read(0, stream.size).tolist()
    there = bytes(id if id < 256 else 0 for id in ids)
    other = (there[700:1500].replace(b"\0", b"")
             + b"and here is something that was never trained on at all. " * 9)
    (folder / "half.txt").write_bytes(other)
    places = [other[start:start + 32] for start in range(0, len(other) - 31, 16)]
    found = evaluated("data.path=half.txt").overlap
    assert (found.windows, found.every) == (len(places), 1)
    assert found.value == sum(place in there for place in places) / len(places)
    assert 0.3 < found.value < 0.7
    assert evaluated("data.path=half.txt", "data.overlap=0").overlap is None


def test_the_record_says_what_was_measured_and_is_no_record_of_training(folder, capsys):
    (folder / "test.txt").write_text("Some other text. " * 40)
    drawn = read_losses(folder / "runs/mine")
    assert main(["eval", "mine", "data.path=test.txt"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "of test.txt (data " in line and "not of what it held out; 0.0% of it also occurs" in line
    assert main(["eval", "mine", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    own, typed, again = records(folder / "runs/mine")
    assert printed == again and losses(again) == losses(own) and "path" not in again
    assert (typed["path"], typed["overlap"], typed["command"]) == (str(folder / "test.txt"), 0.0, "eval")
    assert typed["data"] != again["data"] == json.loads((folder / "runs/mine/env.json").read_text())["data"]
    assert typed["data"][:16] in {path.name for path in (folder / "runs/mine/data").iterdir()}
    after = read_losses(folder / "runs/mine")
    assert after.evaluated.tolist() == drawn.evaluated.tolist()
    assert after.heldout.keys() == drawn.heldout.keys()
    sink = JsonlSink(folder / "eval.jsonl")
    sink.write({"step": 3, "command": "eval"})
    assert not sink.has(3)
    sink.cut_to(3)
    assert len(sink.path.read_text().splitlines()) == 1
    sink.cut_to(2)
    assert sink.path.read_text() == ""


def test_the_mask_and_the_tokens_are_those_of_training(folder):
    """An option of `data` that is typed brings its section whole, the mask's default among it."""
    shutil.rmtree("corpus")
    corpus(Path("corpus"), documents=2)
    masked, own = evaluated("data.path=corpus"), evaluated()
    assert evaluated("data=text", "data.path=corpus").losses == masked.losses
    assert evaluated("data.path=corpus", "data.mask_documents=false").losses != masked.losses
    (prepared,) = [path for path in Path("runs/mine/data").iterdir() if path.name == own.fingerprint[:16]]
    same = evaluated("data=tokens", f"data.path={prepared}")
    assert same.typed is None and same.losses == own.losses


def test_the_path_that_the_run_was_trained_on_is_not_other_data(folder):
    """The words of the command that trained it may be typed again: its training text is not measured."""
    text = (folder / "runs/mine/config.yaml").read_text()
    (recorded,) = [line.split(": ")[1] for line in text.splitlines() if line.startswith("  path: ")]
    (folder / "runs/mine/config.yaml").write_text(text.replace(recorded, str(folder / "corpus")))
    own = evaluated()
    for words in (["data.path=corpus"], ["data=text", "data.path=corpus", "data.held_out_share=0.05"]):
        again = evaluated(*words)
        assert again.typed is None and again.losses == own.losses, words
    words = ["mine", "data=text"]                        # without a path: the built-in corpus
    assert data_keys(load_trained(for_run(["mine"])).config, for_run(words), typed_keys(words)) == {"data"}


def test_what_is_typed_has_to_say_which_data(folder, capsys):
    (folder / "tokenizer.json").write_text(
        '{"model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "</s>": 1}, "unk_token": "[UNK]"}}')
    shutil.copytree("runs/mine", "runs/synthetic")
    for words, code in ((["data.domain_cap=5"], 176), (["data.path=corpus", "data.held_out=corpus"], 177),
                        (["data.tokenizer=tokenizer.json"], 172),
                        (["data.path=corpus", "data.tokenizer=tokenizer.json"], 172),
                        (["data=synthetic", "data.vocab_size=300"], 175)):
        assert main(["eval", "mine", *words]) == 12
        assert f"E-DATA-{code}" in capsys.readouterr().err
    assert len(records(folder / "runs/mine")) == 1


def test_a_run_on_generated_tokens_reads_no_text(folder, capsys):
    train(folder, "data=synthetic", "data.vocab_size=48", "run.name=made", "~data.path")
    assert main(["eval", "made", "data=text", "data.path=corpus"]) == 12
    assert "E-DATA-173" in capsys.readouterr().err
    assert losses(records(folder / "runs/made")[0]) == evaluate_run(for_run(["made"])).losses

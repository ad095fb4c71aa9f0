"""`moetrain data inspect` of tokens: reads and counts as training does, and writes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from moetrain.__main__ import main
from moetrain.config.compose import compose
from moetrain.data.loader import TokenDataset, build_dataset
from moetrain.data.preparation.prepare import prepare
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from tests.support import needs
from tests.support.indexed_data import build
from tests.support.opened_files import opened_files
from tests.support.token_writers import WRITERS, end_of_documents, llmc, nanogpt
from tests.support.tree_content import everything

FORMATS = {"nanoGPT": "nanoGPT, uint16", "llm.c GPT-2": "llm.c version 1, uint16",
           "llm.c Llama 3": "llm.c version 7, uint32",
           "OLMo": "OLMo, uint16", "OLMo 2": "OLMo, uint32", "numpy": "NumPy .npy, uint16",
           "numpy int64": "NumPy .npy, int64"}
END = 7
STORIES = [f"the lazy dog {number} jumps" for number in range(40)]


def documents(seed: int, count: int, length: int = 20) -> list[np.ndarray]:
    return [np.random.default_rng(seed + number).integers(8, 300, length) for number in range(count)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return tmp_path


def inspected(capsys: pytest.CaptureFixture, *words: str, code: int = 0) -> dict:
    """The record, seen to be the one of what training reads."""
    before = everything(Path("."))
    assert main(["data", "inspect", "--json", *words]) == code
    assert everything(Path(".")) == before
    found = json.loads(capsys.readouterr().out)
    if code == 0:
        dataset = build_dataset(compose([word if "=" in word else f"data.path={word}" for word in words]),
                                Path("unused"), None)
        assert isinstance(dataset, TokenDataset) and found["fingerprint"] == dataset.fingerprint
        assert ((found["tokens"]["train"], found["tokens"]["heldout"])
                == (dataset.train_stream.size, dataset.heldout_stream.size))
        for side, stream in (("train", dataset.train_stream), ("heldout", dataset.heldout_stream)):
            assert (sum(row[side]["documents"] for row in found["domains"].values())
                    == len(stream.document_starts))
            for number, name in enumerate(dataset.domains):
                begin, end = stream.domain_range(number)
                assert found["domains"][name][side]["tokens"] == end - begin
        trained = [stream_text(dataset.train_stream, place)
                   for place in range(len(dataset.train_stream.document_starts))]
        assert all(document["tokens"] in trained for document in found["documents"])
    return found


def stream_text(stream, document: int) -> list[int]:
    bounds = [*stream.document_starts.tolist(), stream.size]
    return stream.read(bounds[document], min(64, bounds[document + 1] - bounds[document])).tolist()


def files(found: dict, key: str = "data.path") -> dict[str, dict]:
    return {file["name"]: file for file in found["files"][key]}


def test_each_format_is_named_with_its_type_and_counts(capsys: pytest.CaptureFixture) -> None:
    for number, (name, (write, suffix, _)) in enumerate(WRITERS.items()):
        write(Path(f"in/{number}web{suffix}"), end_of_documents(documents(100 * number, 40), END))
    found = inspected(capsys, "in", "data=memmap", f"data.end_token={END}", "data.vocab_size=128256",
                      "run.steps=3", "train.seq_len=8", "train.global_batch=4")
    assert [files(found)[name]["format"] for name in sorted(files(found))] == list(FORMATS.values())
    for file in found["files"]["data.path"]:
        assert ((file["documents"], file["tokens"], file["heldout"], file["side"])
                == (40, 840, 42, "trained on"))
        assert ((file["end_id"], file["end_share"], file["size"])
                == (END, 1.0, Path("in", file["name"]).stat().st_size))
    assert (found["end_token"] == {"id": END, "share": 1.0}
            and (found["tokenizer"], found["vocab_size"]) == ("none", 128256))
    assert found["domains"]["0web"]["train"] == {"documents": 38, "tokens": 798}
    assert found["domains"]["0web"]["heldout"] == {"documents": 2, "tokens": 42}
    assert ((found["steps"], found["tokens_per_step"], found["epochs"])
            == (3, 32, 96 / found["tokens"]["train"]))
    assert sum(row["share"] for row in found["domains"].values()) == pytest.approx(1)
    assert len({document["domain"] for document in found["documents"]}) == 3
    for document in found["documents"]:
        assert ((document["length"], document["complete"], document["ended"], document["text"])
                == (21, True, True, None))


def test_both_sides_and_what_is_left_alone_are_told_with_the_reason(capsys: pytest.CaptureFixture) -> None:
    for seed, name in enumerate(("web_train_1", "web_train_2", "web_val_1", "web_test_1", "own")):
        llmc(Path(f"in/{name}.bin"), end_of_documents(documents(100 * seed, 30), END))
    Path("in/meta.pkl").write_bytes(b"\x80\x04.")
    Path("in/readme.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely")
    Path("in/.hidden").write_text("x")
    Path("in/empty.bin.part").write_bytes(b"")
    found = inspected(capsys, "in", "data=memmap")
    assert {name: (file["side"], file["reason"]) for name, file in files(found).items()} == {
        "web_train_1.bin": ("trained on", ""), "web_train_2.bin": ("trained on", ""),
        "own.bin": ("trained on", ""), "web_val_1.bin": ("held out", ""),
        "web_test_1.bin": ("trained on", "test split"), "meta.pkl": ("trained on", "no token file"),
        "readme.txt": ("trained on", "no token file"), ".hidden": ("trained on", "hidden"),
        "empty.bin.part": ("trained on", "empty")}
    text = files(found)["readme.txt"]
    assert (text["format"], text["convert"]) == ("text", "data=text data.path=in/readme.txt")
    assert files(found)["web_val_1.bin"]["heldout"] == 630 and files(found)["web_train_1.bin"]["heldout"] == 0
    # no end token: a file is one
    assert files(found)["own.bin"]["heldout"] == 31 and files(found)["own.bin"]["documents"] == 1
    assert found["end_token"] == {"id": None, "share": None}
    own, web = (found["domains"][name] for name in ("own", "web"))
    assert ((own["share"], web["share"]) == pytest.approx((599 / 1859, 1260 / 1859), rel=0.02)
            and own["epochs"] > 0)
    ledger = found["account"]["files"]["data.path"]
    assert (ledger["bytes"] == sum(path.stat().st_size for path in Path("in").iterdir())
            and ledger["files"] == 9)
    assert sum(row["bytes"] for row in ledger["read"] + ledger["left_out"]) == ledger["bytes"]
    typed = inspected(capsys, "in", "data=memmap", "data.held_out=in/own.bin")
    assert {name: file["reason"] for name, file in files(typed).items() if name.endswith(".bin")} == {
        "web_train_1.bin": "", "web_train_2.bin": "", "own.bin": "data.held_out",
        "web_val_1.bin": "validation split", "web_test_1.bin": "test split"}
    assert files(typed, "data.held_out")["own.bin"]["side"] == "held out"


def test_a_person_sees_the_same(capsys: pytest.CaptureFixture) -> None:
    nanogpt(Path("in/train.bin"), end_of_documents(documents(0, 60), END))
    nanogpt(Path("in/val.bin"), end_of_documents(documents(99, 5), END)[:-1])
    Path("in/notes.md").write_text("# Notes of some length, so that they are seen to be text")
    assert (main(["data", "inspect", "in", "data=memmap", f"data.end_token={END}", "data.weights={text: 2}"])
            == 0)
    shown = capsys.readouterr().out
    for words in ("nanoGPT, uint16, held out", "1,260", "no token file, text",
                  "data=text data.path=in/notes.md", "text 2",
                  "epochs", f"id {END}, in which 98.5% of the documents", "none, 50,304 ids",
                  "[text] 21 tokens: "):
        assert words in shown, (words, shown)
    assert max(map(len, shown.splitlines())) < 200
    nanogpt(Path("one.bin"), documents(0, 1, 1000)[0])
    assert main(["data", "inspect", "one.bin", "data=memmap"]) == 0
    assert "none is known" in capsys.readouterr().out


def test_documents_are_decoded_with_the_tokenizer_that_is_named(capsys: pytest.CaptureFixture) -> None:
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, vocab_size=300,
                                special_tokens=["<pad>", "<|endoftext|>"])
    library.save("tokenizer.json")
    nanogpt(Path("in/a.bin"), end_of_documents([np.array(library.encode(story).ids) for story in STORIES], 1))
    found = inspected(capsys, "in/a.bin", "data=memmap", "data.tokenizer=tokenizer.json")
    texts = {document["text"] for document in found["documents"]}
    assert texts <= set(STORIES[:38]) and len(texts) == len(found["documents"]) == 3
    assert all(document["ended"] and document["tokens"][-1] == 1 for document in found["documents"])
    assert found["end_token"] == {"id": 1, "share": 1.0} and found["tokenizer"] == "tokenizer.json"
    assert main(["data", "inspect", "in/a.bin", "data=memmap", "data.tokenizer=tokenizer.json"]) == 0
    assert f"{found['documents'][0]['text']} <end>" in capsys.readouterr().out


def test_errors_are_those_of_training_after_what_is_known(capsys: pytest.CaptureFixture) -> None:
    nanogpt(Path("in/a.bin"), documents(0, 1, 1000)[0])
    for words, id, some in ((["in"], "E-DATA-163", True),
                            (["in", "data.vocab_size=100", "data.dtype=uint16"], "E-DATA-073", True),
                            (["none"], "E-DATA-160", False),
                            (["in", "data.weights={x: 1}"], "E-DATA-100", True)):
        end = ["data.end_token=5"] * (id == "E-DATA-163")
        found = inspected(capsys, "data=memmap", *words, *end, code=12)
        assert (found["error"]["id"] == id and ("data.path" in found["files"]) == some
                and "tokens" not in found)
        assert main(["data", "inspect", "data=memmap", *words, *end]) == 12
        said = capsys.readouterr()
        assert id in said.err and ("a.bin" in said.out) == some


def test_indexes_of_an_earlier_start_are_used(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    nanogpt(Path("in/a.bin"), end_of_documents(documents(0, 50), END))
    words = ["in", "data=memmap", f"data.end_token={END}", "data.cache=kept"]
    first = inspected(capsys, *words)
    build_dataset(compose(["data.path=in", *words[1:]]), Path("unused"), None,
                  indexes=TokenIndexes(Path("kept"), use="keep"))
    with opened_files(tmp_path / "in") as opened:
        assert main(["data", "inspect", "--json", *words, "data.held_out_share=0.5"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert files(first)["a.bin"]["heldout"] < files(again)["a.bin"]["heldout"]
    assert opened == []  # the documents that it shows come by a descriptor that is open still


def test_indexed_data_and_the_weights_of_a_blend(capsys: pytest.CaptureFixture) -> None:
    needs.module("megatron.core", extra="megatron")
    Path("in/below").mkdir()
    for number, name in enumerate(("in/a", "in/b", "in/below/c")):
        build(Path(name), [[np.append(document, END)] for document in documents(100 * number, 40 + number)],
              np.int32)
    found = inspected(capsys, "0.7 in/a 0.3 in/b", "data=megatron")
    assert {name: (file["format"], file["documents"], file["tokens"])
            for name, file in files(found).items()} == {
        "a.bin": ("Megatron indexed, int32", 40, 840), "a.idx": ("index of a.bin", 0, 0),
        "b.bin": ("Megatron indexed, int32", 41, 861), "b.idx": ("index of b.bin", 0, 0)}
    assert ((found["mixture"], found["weights"], found["end_token"])
            == (None, {"a": 0.7, "b": 0.3}, {"id": END, "share": 1.0}))
    assert [row["share"] for row in found["domains"].values()] == pytest.approx([0.7, 0.3], abs=0.01)
    folder = inspected(capsys, "in", "data=megatron", "data.held_out=in/b")
    assert {name: file["reason"] for name, file in files(folder).items()} == {
        "a.bin": "", "a.idx": "", "b.bin": "data.held_out", "b.idx": "data.held_out",
        "below/c.bin": "no token file", "below/c.idx": "no token file"}
    assert files(folder)["below/c.bin"]["convert"] == "data=megatron data.path=in/below/c"
    assert main(["data", "inspect", "0.7 in/a 0.3 in/b", "data=megatron"]) == 0
    assert "weights    a 0.7, b 0.3 (of the blend" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bytes", "tokenizer.json"])
def test_prepared_tokens(name: str, capsys: pytest.CaptureFixture) -> None:
    for number, story in enumerate(STORIES):
        (Path("in") / f"{number}.txt").write_text(story * 5)
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(STORIES, vocab_size=300, special_tokens=["<|endoftext|>"])
    library.save("tokenizer.json")
    folder = prepare(path="in", out=Path("out"), tokenizer=name)
    capsys.readouterr()
    (folder / "stray.log").write_text("x")
    found = inspected(capsys, str(folder), "data=tokens")
    description = json.loads((folder / "dataset.json").read_text())
    for side in ("train", "heldout"):
        assert (found["domains"]["txt"][side]
                == {what: description[side]["txt"][what] for what in ("documents", "tokens")})
    shards = {file["name"]: file for file in found["files"]["data.path"]}
    assert shards["train-00000.tokens"]["format"] == "prepared shard, uint16"
    assert shards["heldout-00000.tokens"]["side"] == "held out"
    assert (shards["train-00000.tokens"]["tokens"] == found["tokens"]["train"]
            and shards["stray.log"]["reason"] == "no token file")
    assert (found["end_token"] == {"id": description["end_id"], "share": 1.0}
            and found["vocab_size"] == description["vocab_size"])
    assert found["tokenizer"] == ("bytes" if name == "bytes" else str(folder / name))
    assert all(document["text"].startswith("the lazy dog") for document in found["documents"])
    counts = description["train"]["txt"]
    rate = counts["bytes"] / (found["tokens"]["train"] - counts["documents"])
    assert found["tokens"]["bytes_per_token"] == (1.0 if name == "bytes" else pytest.approx(rate))
    assert main(["data", "inspect", str(folder), "data=tokens"]) == 0


def test_names_mean_what_they_mean_of_text(capsys: pytest.CaptureFixture) -> None:
    for number, story in enumerate(STORIES):
        (Path("in") / f"{number}.txt").write_text(story * 5)
    assert main(["data", "inspect", "in", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)
    folder = prepare(path="in", out=Path("out"), tokenizer="bytes")
    capsys.readouterr()
    tokens = inspected(capsys, str(folder), "data=tokens")
    assert set(text) <= set(tokens) and set(text["tokens"]) == set(tokens["tokens"])
    assert text["tokens"] | {"estimated": False} == tokens["tokens"]
    for name in ("steps", "tokens_per_step", "epochs", "error"):
        assert text[name] == tokens[name], name
    assert set(text["documents"][0]) - {"bytes"} <= set(tokens["documents"][0])
    shared = set(text["files"]["data.path"][0]) & set(tokens["files"]["data.path"][0])
    assert {"name", "size", "side", "reason", "format", "convert", "documents"} == shared

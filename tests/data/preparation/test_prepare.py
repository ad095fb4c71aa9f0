"""Text to a dataset folder: real files, odd files, damage, and what must not depend on what."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moetrain.config.schema import Config, DataConfig
from moetrain.data.corpus import builtin as corpus, selection as selection_module
from moetrain.data.preparation.prepare import prepare, prepare_from_config
from moetrain.data.preparation.prepared_dataset import Prepared, open_prepared
from moetrain.data.preparation.split_writer import SplitWriter
from moetrain.data.tokenizers.tokenizer import load_tokenizer
from moetrain.errors import DataError, DiskError

WORDS = ("router", "expert", "token", "weight", "shard", "layer", "gate", "\u00fcber", "slot")


def text(seed: int, size: int = 900) -> str:
    chance = np.random.default_rng(seed)
    numbers = chance.integers(len(WORDS), size=size // 9)
    return " ".join(WORDS[number] + str(chance.integers(1000)) for number in numbers)


def corpus_folder(root: Path, documents: int = 60, names: str = "file{}") -> Path:
    for number in range(documents):
        folder = root / ("code" if number % 2 else "prose")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (names.format(number) + ".txt")).write_text(text(number))
    return root


def run(path: Path | None, out: Path, tokenizer: str = "bytes", cap: int | None = None,
        **more: object) -> Prepared:
    folder = prepare(path=str(path) if path else None, out=out, tokenizer=tokenizer, domain_cap=cap, **more)
    return open_prepared(folder, verify=True)


def texts(prepared: Prepared, split: str) -> list[bytes]:
    stream = getattr(prepared, split)
    ids, end = stream.read(0, stream.size).tolist(), prepared.description["end_id"]
    parts: list[list[int]] = [[]]
    for id in ids:
        parts[-1].append(id) if id != end else parts.append([])
    assert parts.pop() == []
    return [bytes(part) for part in parts]


def refused(number: int, path: Path, out: Path, **more: object) -> DataError:
    with pytest.raises(DataError) as caught:
        run(path, out, **more)
    assert caught.value.id == f"E-DATA-{number:03d}", caught.value
    return caught.value


def test_a_folder_becomes_documents_by_domain(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "in")
    prepared = run(source, tmp_path / "out")
    written = texts(prepared, "train") + texts(prepared, "heldout")
    assert sorted(written) == sorted(path.read_bytes() for path in source.rglob("*.txt"))
    assert prepared.domains == ("code", "prose") and prepared.vocab_size == 257
    description = prepared.description
    assert description["source_files"] == 60 and description["train"]["code"]["documents"] <= 30
    for split in ("train", "heldout"):
        assert (sum(counts["bytes"] for counts in description[split].values())
                == sum(map(len, texts(prepared, split))))
        assert (sum(counts["tokens"] for counts in description[split].values())
                == getattr(prepared, split).size)
        assert all(counts["documents"] for counts in description[split].values())


def test_nothing_held_out_is_trained_on_and_duplicates_go_first(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "in")
    for path in list(source.rglob("*.txt")):
        (source / "code" / f"copy of {path.name}").write_bytes(path.read_bytes())
    prepared = run(source, tmp_path / "out")
    train, heldout = texts(prepared, "train"), texts(prepared, "heldout")
    assert train and heldout and not set(train) & set(heldout)
    assert len(train) + len(heldout) == 60
    assert prepared.description["heldout_overlap"] == 0


def test_overlap_is_measured(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "in")
    for path in list(source.rglob("*.txt")):
        (source / f"{path.stem}.near").write_bytes(path.read_bytes() + b"!")
    assert run(source, tmp_path / "out").description["heldout_overlap"] > 0.9


def test_fingerprint_and_files_do_not_depend_on_place_names_or_order(tmp_path: Path) -> None:
    first = run(corpus_folder(tmp_path / "in"), tmp_path / "out")
    second = run(corpus_folder(tmp_path / "elsewhere", names="{}-renamed"), tmp_path / "out2")
    assert first.fingerprint == second.fingerprint and first.folder.name == second.folder.name
    for path in first.folder.glob("*.tokens"):
        assert path.read_bytes() == (second.folder / path.name).read_bytes()
    files = (tmp_path / "in").rglob("*.txt")
    lines = [json.dumps({"text": path.read_text(), "domain": path.parent.name}) for path in files]
    (tmp_path / "all.jsonl").write_text("\n".join(sorted(lines)) + "\n\n")
    assert run(tmp_path / "all.jsonl", tmp_path / "out3").fingerprint == first.fingerprint


def test_an_unchanged_source_is_not_read_again_and_a_changed_one_gives_another_folder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus_folder(tmp_path / "in")
    first = run(source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(selection_module, "documents", lambda *_, **__: pytest.fail("read again"))
        assert run(source, tmp_path / "out").folder == first.folder
    (tmp_path / "out" / "sources.json").write_text("{")                   # only costs time
    assert run(source, tmp_path / "out").folder == first.folder
    assert times == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    (source / "code" / "file1.txt").write_text("changed " * 99)
    second = run(source, tmp_path / "out")
    assert second.folder != first.folder and second.fingerprint != first.fingerprint
    assert run(source, tmp_path / "out", cap=5000).folder not in (first.folder, second.folder)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_damaged_dataset_is_refused_not_reused(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "in")
    folder = run(source, tmp_path / "out").folder
    shard = folder / "train-00000.tokens"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3] + b"\1" + whole[-2:])
    assert str(shard) in refused(7, source, tmp_path / "out").where
    shard.unlink()
    refused(1, source, tmp_path / "out")
    shard.write_bytes((folder / "heldout-00000.tokens").read_bytes())      # whole, but another
    refused(12, source, tmp_path / "out")
    shard.write_bytes(whole)
    description = folder / "dataset.json"
    description.write_text(description.read_text().replace('"end_id": 256', '"end_id": 255'))
    refused(11, source, tmp_path / "out")
    description.write_text("[]")
    refused(11, source, tmp_path / "out")


def test_few_documents_give_up_their_last_twentieth(tmp_path: Path) -> None:
    source = tmp_path / "book.md"
    source.write_text(text(1, 20_000))
    prepared = run(source, tmp_path / "out")
    (train,), (heldout,) = texts(prepared, "train"), texts(prepared, "heldout")
    assert train + heldout == source.read_bytes() and prepared.domains == ("md",)
    assert abs(len(heldout) - len(source.read_bytes()) // 20) < 4
    train.decode(), heldout.decode()                                      # no character is cut


def test_every_domain_has_both_sides(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "in")
    for number in range(2):
        (source / f"pair{number}.rst").write_text(text(1000 + number))
    (source / "single.cfg").write_text(text(2000))
    counts = run(source, tmp_path / "out").description
    for domain in ("cfg", "code", "prose", "rst"):
        assert counts["train"][domain]["documents"] > 0 and counts["heldout"][domain]["documents"] > 0


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("not enough")
    assert "10 bytes" in refused(35, tmp_path / "short.txt", tmp_path / "out").why


def test_domain_cap_counts_bytes(tmp_path: Path) -> None:
    counts = run(corpus_folder(tmp_path / "in"), tmp_path / "out", cap=6000).description
    for domain in ("code", "prose"):
        assert 5900 < counts["train"][domain]["bytes"] + counts["heldout"][domain]["bytes"] <= 6000


def test_odd_files_have_defined_results(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "in", documents=30)
    odd = source / "odd"
    (odd / ".hidden").mkdir(parents=True)
    (odd / ".hidden" / "x.txt").write_text("SECRET" * 200)
    (odd / ".y.txt").write_text("SECRET" * 300)
    (odd / "empty.txt").touch()
    (odd / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"BOM" * 300)
    (odd / "crlf.txt").write_bytes(b"CRLF\r\n" * 200)
    (odd / "latin.txt").write_bytes(b"caf\xe9 and some more plain text. " * 30)
    (odd / "nul.bin").write_bytes(b"ab\0cd" * 100)
    (odd / "noise.bin").write_bytes(bytes(range(128, 256)) * 10)
    (odd / "line.txt").write_bytes(b"x" * 3_000_000)
    (odd / "loop").symlink_to(source, target_is_directory=True)
    (odd / "nowhere").symlink_to(tmp_path / "nowhere")
    os.mkfifo(odd / "pipe")
    prepared = run(source, source / "out")                                 # our own output is not input
    every = texts(prepared, "train") + texts(prepared, "heldout")
    assert len(every) == 34 and b"BOM" * 300 in every and b"CRLF\r\n" * 200 in every
    assert any(b"caf\xe9" in text for text in every) and not any(b"SECRET" in text for text in every)
    left_out = sorted((row["reason"], row["files"], row["bytes"])
                      for row in prepared.description["account"]["files"]["data.path"]["left_out"])
    assert (left_out
            == [("empty", 1, 0), ("hidden", 2, 3000), ("no file", 2, 0), ("not text", 1, 500),
                ("not text", 1, 1280)])
    assert run(source, source / "out").folder == prepared.folder


def test_binary_missing_and_empty_sources_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "nul").write_bytes(b"text \0 text" * 100)
    assert "nul, byte 5" in refused(31, tmp_path / "nul", out).where
    (tmp_path / "noise").write_bytes(b"ok" + bytes(range(128, 256)) * 9)
    assert "byte 2" in refused(31, tmp_path / "noise", out).where
    (tmp_path / "all").mkdir()
    refused(32, tmp_path / "all", out)
    (tmp_path / "all" / "a.bin").write_bytes(b"\0")
    (tmp_path / "all" / "b.bin").write_bytes(b"\0")
    refused(31, tmp_path / "all", out)
    (tmp_path / "empty").touch()
    refused(32, tmp_path / "empty", out)
    refused(30, tmp_path / "missing", out)
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf")
    refused(32, tmp_path / "bom", out)
    refused(20, tmp_path / "bom", out, tokenizer=str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("line, number", [("{", 33), ("[]", 33), ("3", 33), ("[" * 9999, 33),
                                          ('{"txt": "a"}', 130), ('{"text": 1}', 131),
                                          ('{"text": "a", "domain": 1}', 131)])
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: str, number: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    assert "line 3, byte 18" in refused(number, tmp_path / "a.jsonl", tmp_path / "out").where


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "in")
    changed = source / "code" / "file1.txt"

    def change(what: str, done: int, size: int) -> None:
        if what == "reading" and done == size:
            changed.write_text("grown " * 500)

    assert str(changed) in refused(34, source, tmp_path / "out", progress=change).where
    assert not list((tmp_path / "out").iterdir())


def test_progress_of_each_part_runs_to_all_of_it(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    source = corpus_folder(tmp_path / "in")
    (source / "long.txt").write_text(text(7, 90) + " line\n" * 500_000)           # 3 MB: not one step
    run(source, tmp_path / "out", progress=lambda *step: seen.append(step))
    for what in ("reading", "tokenizing"):
        steps = [(done, size) for name, done, size in seen if name == what]
        assert (steps == sorted(steps) and len({size for _, size in steps}) == 1
                and steps[-1][0] == steps[-1][1])
        assert max(np.diff([0, *(done for done, _ in steps)])) < 2_000_000
    assert [name for name, _, _ in seen] == sorted(name for name, _, _ in seen)


def test_an_output_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError) as caught:
        run(corpus_folder(tmp_path / "in"), tmp_path / "file" / "out")
    assert caught.value.code == 14 and str(tmp_path / "file") in caught.value.where


def test_a_tokenizer_file_travels_with_the_dataset(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    source = corpus_folder(tmp_path / "in")
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel()
    library.train_from_iterator([text(1)], trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"],
        show_progress=False))
    library.save(str(tmp_path / "tokenizer.json"))
    prepared = run(source, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").unlink()
    assert prepared.tokenizer.vocab_size == prepared.vocab_size
    assert prepared.fingerprint != run(source, tmp_path / "out").fingerprint
    assert prepared.train.size < run(source, tmp_path / "out").train.size
    assert (load_tokenizer(str(prepared.folder / "tokenizer.json")).identity
            == prepared.description["tokenizer"])
    assert prepared.tokenizer.identity == prepared.description["tokenizer"]


def test_shards_are_one_address_space(tmp_path: Path) -> None:
    from moetrain.data.preparation.prepared_dataset import write_description

    counts = {}
    for split in ("train", "heldout"):
        writer = SplitWriter(folder=tmp_path, split=split, vocab_size=1000, domains=("a", "b"),
                             shard_tokens=64)
        for start, length, domain in ((0, 50, 0), (50, 10, 0), (60, 200, 1), (260, 1, 1)):
            writer.add(np.arange(start, start + length), domain, length)
        writer.flush()
        counts[split] = writer.counts
    write_description(tmp_path, {"fingerprint": "f", "tokenizer": "bytes", "vocab_size": 1000,
                                 "domains": ["a", "b"], "heldout_overlap": 0.0, **counts})
    prepared = open_prepared(tmp_path / "train-00001.tokens", verify=True)
    stream = prepared.train
    assert len(list(tmp_path.glob("train-*"))) == 5 and stream.size == 261
    assert all(stream.read(start, 70).tolist() == list(range(start, start + 70))
               for start in range(0, 191, 7))
    assert stream.domain_range(0) == (0, 60) and stream.domain_range(1) == (60, 261)
    assert prepared.description["train"]["b"] == {"documents": 2, "tokens": 201, "bytes": 201}


def test_the_builtin_corpus_has_five_domains_and_is_the_same_twice(tmp_path: Path) -> None:
    config = Config(data=DataConfig(domain_cap=400_000))
    folder = prepare_from_config(config, tmp_path / "run")
    assert folder.parent == tmp_path / "run" / "data"
    prepared = open_prepared(folder, verify=True)
    assert prepared.domains == ("cpp", "docs", "notices", "python", "stubs")
    assert set(texts(prepared, "train")).isdisjoint(texts(prepared, "heldout"))
    assert all(300_000 < counts["bytes"] <= 400_000 for counts in prepared.description["train"].values())
    assert all(len(text) <= corpus.HELDOUT_LIMIT for text in texts(prepared, "heldout"))
    cached = Config(data=DataConfig(domain_cap=400_000, cache=str(tmp_path / "again")))
    assert prepare_from_config(cached, tmp_path / "run2") == tmp_path / "again" / folder.name


def test_too_small_a_builtin_corpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "DISTRIBUTIONS", ("numpy",))
    assert "notices" in refused(40, None, tmp_path).why

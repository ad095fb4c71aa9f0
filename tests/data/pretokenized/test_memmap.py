"""data=memmap: files of other trainers come back token by token with their splits; others are named."""

import gzip
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from tokenizers import ByteLevelBPETokenizer

from moetrain.config.compose import compose
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.loader import build_dataset
from moetrain.data.tokens import blocks as token_blocks
from moetrain.errors import DataError
from tests.support import warm_start
from tests.support.command_line import DEBUG, environment, numbers
from tests.support.token_writers import LLAMA_3, WRITERS, end_of_documents, llmc, nanogpt, olmo

EOT, GPT2, LLAMA = 50256, 50257, 128_256


def ids(seed: int, count: int, vocab_size: int = GPT2 - 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def documents(seed: int, lengths: list[int], vocab_size: int = GPT2 - 1) -> list[np.ndarray]:
    return [ids(seed + number, length, vocab_size) for number, length in enumerate(lengths)]


def dataset(path: Path | str, *overrides: str) -> TokenDataset:
    return build_dataset(compose(["data=memmap", f"data.path={path}", "train.seq_len=8", *overrides]),
                         Path("unused"), None)


def tokens(stream) -> list[int]:
    return stream.read(0, stream.size).astype(np.int64).tolist()


def refused(path: Path | str, *overrides: str) -> DataError:
    with pytest.raises(DataError) as caught:
        dataset(path, *overrides)
    assert caught.value.code == 12 and caught.value.next
    return caught.value


@pytest.mark.parametrize("name", WRITERS)
def test_the_tokens_of_every_format_come_back(tmp_path: Path, name: str) -> None:
    write, suffix, vocab_size = WRITERS[name]
    trained, held = ids(1, 5001, vocab_size), ids(2, 777, vocab_size)
    write(tmp_path / f"train{suffix}", trained)
    write(tmp_path / f"val{suffix}", held)
    data = dataset(tmp_path, f"data.vocab_size={vocab_size}")
    assert tokens(data.train_stream) == trained.tolist() and tokens(data.heldout_stream) == held.tolist()
    assert data.domains == ("text",) and data.vocab_size == vocab_size and data.tokenizer is None
    batch = data.batch(np.array([0]))
    assert torch.equal(batch.targets_BS[0, :-1], batch.tokens_BS[0, 1:])


def test_a_val_file_beside_the_train_file_that_is_named_is_held_out(tmp_path: Path,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for seed, name in enumerate(("train", "val", "test")):
        nanogpt(tmp_path / f"{name}.bin", ids(seed, 100))
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04.")
    file, folder = dataset(tmp_path / "train.bin"), dataset(tmp_path)
    assert file.fingerprint == folder.fingerprint and tokens(file.heldout_stream) == ids(1, 100).tolist()
    assert tokens(folder.train_stream) == ids(0, 100).tolist()
    assert "left alone, as a test set is: test.bin" in caplog.text and "(3 bytes): meta.pkl" in caplog.text
    merged = dataset(tmp_path, "data.split=merge")
    assert (merged.domains == ("test", "train", "val")
            and merged.train_stream.size + merged.heldout_stream.size == 300)
    alone = dataset(tmp_path / "val.bin")                    # named itself, it is what is trained on
    assert tokens(alone.train_stream) + tokens(alone.heldout_stream) == ids(1, 100).tolist()


def test_shards_of_one_name_are_one_domain_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """As modded-nanogpt's cached_fineweb10B.py lays them out."""
    for number in (1, 2, 10):
        llmc(tmp_path / f"fineweb_train_{number:06d}.bin", ids(number, 100))
        olmo(tmp_path / f"part-{number}-00000.npy", ids(100 + number, 50))
    llmc(tmp_path / "fineweb_val_000000.bin", ids(0, 60))
    data = dataset(tmp_path)
    assert data.domains == ("fineweb", "part")
    begin, end = data.train_stream.domain_range(0)
    assert (data.train_stream.read(begin, end - begin).tolist()
            == np.concatenate([ids(n, 100) for n in (1, 2, 10)]).tolist())
    begin, end = data.heldout_stream.domain_range(0)
    assert data.heldout_stream.read(begin, end - begin).tolist() == ids(0, 60).tolist()
    begin, end = data.train_stream.domain_range(1)           # no set of its own: its end is held out
    assert (data.train_stream.read(begin, end - begin).tolist()
            == np.concatenate([ids(100 + n, 50) for n in (1, 2, 10)])[:143].tolist())
    pattern = dataset(f"{tmp_path}/fineweb_train_*.bin")
    assert pattern.domains == ("fineweb",) and tokens(pattern.heldout_stream) == ids(0, 60).tolist()


def test_the_end_is_held_out_from_a_border_between_documents_on(tmp_path: Path) -> None:
    written = documents(0, [200, 300, 400, 60])
    nanogpt(tmp_path / "a.bin", end_of_documents(written, EOT))
    data = dataset(tmp_path / "a.bin", f"data.end_token={EOT}")
    assert tokens(data.heldout_stream) == [*written[-1].tolist(), EOT]
    assert (data.train_stream.document_starts.tolist() == [0, 201, 502]
            and data.heldout_stream.document_starts.tolist() == [0])
    unknown = dataset(tmp_path / "a.bin")                    # one document, cut where the share ends
    assert unknown.heldout_stream.size == 964 // 20 and unknown.train_stream.document_starts.tolist() == [0]
    assert unknown.fingerprint != data.fingerprint
    many = dataset(tmp_path / "a.bin", "data.held_out_share=0.5", f"data.end_token={EOT}")
    assert many.heldout_stream.size == 401 + 61


def test_attention_stays_inside_what_the_end_token_closes(tmp_path: Path) -> None:
    nanogpt(tmp_path / "a.bin", end_of_documents(documents(0, [3, 40]), EOT))
    batch = dataset(tmp_path / "a.bin", f"data.end_token={EOT}",
                    "data.mask_documents=true").batch(np.array([0]))
    assert batch.tokens_BS[0, 1:5].tolist() == [*documents(0, [3])[0].tolist(), EOT]
    # the first input is the last token of the stream
    assert batch.documents_BS[0].tolist() == [0, 1, 1, 1, 1, 2, 2, 2]


def test_held_out_files_of_ones_own_are_not_trained_on(tmp_path: Path,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate(("a", "b")):
        nanogpt(tmp_path / f"{name}.bin", ids(seed, 100))
    data = dataset(tmp_path, f"data.held_out={tmp_path / 'b.bin'}")
    assert (tokens(data.train_stream) == ids(0, 100).tolist()
            and tokens(data.heldout_stream) == ids(1, 100).tolist())
    (tmp_path / "copy.bin").write_bytes((tmp_path / "b.bin").read_bytes())
    error = refused(tmp_path, f"data.held_out={tmp_path / 'b.bin'}")
    assert error.id == "E-DATA-166" and "copy.bin" in error.why
    with caplog.at_level(logging.WARNING):
        assert dataset(tmp_path).train_stream.size == 3 * 95
    assert "copy.bin holds the same tokens as" in caplog.text
    (tmp_path / "copy.bin").unlink()
    llmc(tmp_path / "web_train_1.bin", ids(3, 50))
    llmc(tmp_path / "web_val_0.bin", ids(4, 50))             # another set is given: this one is left alone
    other = dataset(tmp_path, f"data.held_out={tmp_path / 'b.bin'}")
    assert (other.domains == ("a", "b", "web") and other.train_stream.size == 150
            and other.heldout_stream.size == 100)


def test_ids_of_four_bytes_are_told_from_pairs_of_two(tmp_path: Path) -> None:
    """A uint32 file read as uint16 has twice the ids, every second one 0 or 1, and nothing else shows it."""
    for vocab_size in (GPT2, LLAMA, 5):
        for dtype in ("<u2", "<u4"):
            written = ids(7, 1000, min(vocab_size, 1 << 16) if dtype == "<u2" else vocab_size)
            written.astype(dtype).tofile(tmp_path / "a.bin")
            data = dataset(tmp_path / "a.bin", f"data.vocab_size={vocab_size}")
            assert (tokens(data.train_stream) + tokens(data.heldout_stream)
                    == written.tolist()), (vocab_size, dtype)
    ids(7, 1000, LLAMA).astype("<u4").tofile(tmp_path / "a.bin")
    error = refused(tmp_path / "a.bin", f"data.vocab_size={GPT2}")          # of neither
    assert error.id == "E-DATA-073" and "data.dtype=uint32" in error.next
    forced = dataset(tmp_path / "a.bin", f"data.vocab_size={LLAMA}", "data.dtype=uint16")
    assert forced.train_stream.size + forced.heldout_stream.size == 2000    # as one who knows better says


def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    written = ids(0, 300, 60)
    written[217] = 65
    nanogpt(tmp_path / "a.bin", written)
    error = refused(tmp_path / "a.bin", "data.vocab_size=65")
    assert (error.id == "E-DATA-073" and error.where == f"{tmp_path / 'a.bin'}, token 217"
            and "id 65" in error.why)
    assert dataset(tmp_path / "a.bin", "data.vocab_size=66").vocab_size == 66
    np.save(tmp_path / "b.npy", np.array([1, 2, -1] * 100))
    assert refused(tmp_path / "b.npy").id == "E-DATA-073"


SPOILT: dict[str, Callable[[Path], None]] = {
    "short llm.c": lambda path: os.truncate(path, path.stat().st_size - 2),
    "long llm.c": lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
    "header alone": lambda path: os.truncate(path, 1024),
    "odd": lambda path: path.write_bytes(b"\1\2\3" * 101),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_of_another_length_is_named(tmp_path: Path, how: str) -> None:
    llmc(tmp_path / "a.bin", ids(0, 300))
    SPOILT[how](tmp_path / "a.bin")
    error = refused(tmp_path / "a.bin")
    assert error.id == "E-DATA-162" and error.where == str(tmp_path / "a.bin") and error.why


@pytest.mark.parametrize("content, what, then", [
    ("Call me Ishmael. Some years ago, never mind how long precisely".encode(), "it is text", "data=text"),
    ("字符".encode() * 999, "it is text", "data=text"),
    (gzip.compress(b"tokens" * 99), "gzip", "unpacked"),
    (b"MOETOKEN" + bytes(64), "token shard", "data=tokens"),
    (np.array([20240522, 1, 7, *[0] * 253], "<i4").tobytes(), "multiple-choice", "data.path"),
    (np.array([20240520, 2, 7, *[0] * 253], "<i4").tobytes(), "version 2", "dev/data"),
], ids=["text", "chinese", "gzip", "shard", "examples", "version"])
def test_what_is_no_token_file_is_named(tmp_path: Path, content: bytes, what: str, then: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    error = refused(tmp_path / "a.bin")
    assert error.id == "E-DATA-161" and what in error.why and then in error.next
    np.save(tmp_path / "b.npy", np.zeros((4, 4), np.uint16))
    assert "2 dimensions" in refused(tmp_path / "b.npy").why
    np.save(tmp_path / "c.npy", np.zeros(4, np.float32))
    assert "float32" in refused(tmp_path / "c.npy").why


def test_a_path_without_token_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for path, why in ((tmp_path, "*.bin"), (tmp_path / "x.bin", "not there"),
                      (f"{tmp_path}/*.bin", "not there")):
        error = refused(path)
        assert error.id == "E-DATA-160" and why in error.why
    nanogpt(tmp_path / "a.bin", ids(0, 10))
    assert refused(tmp_path / "a.bin").id == "E-DATA-074"    # 10 tokens have no twentieth


def test_an_end_token_that_occurs_nowhere_is_refused_where_it_is_typed(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nanogpt(tmp_path / "a.bin", ids(0, 300, 255))
    assert refused(tmp_path / "a.bin", "data.end_token=50256").id == "E-DATA-163"
    assert refused(tmp_path / "a.bin", "data.end_token=end").id == "E-DATA-163"
    data = dataset(tmp_path / "a.bin", "data.tokenizer=bytes")
    assert "every file is one document" in caplog.text and data.train_stream.document_starts.tolist() == [0]
    assert data.train_stream.text_bytes(3, 20) == 20
    other = dataset(tmp_path / "a.bin", "data.tokenizer=bytes", f"data.end_token={ids(0, 300, 255)[7]}")
    assert other.train_stream.text_bytes(3, 20) == 19            # the end token is the eighth
    assert other.tokenizer.end_id == ids(0, 300, 255)[7] and 8 in other.train_stream.document_starts.tolist()


def test_the_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    nanogpt(tmp_path / "a" / "train.bin", ids(0, 300))
    nanogpt(tmp_path / "a" / "val.bin", ids(1, 300))
    first = dataset(tmp_path / "a").fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert dataset(tmp_path / "b").fingerprint == dataset(tmp_path / "b" / "train.bin").fingerprint == first
    for name in ("train", "val"):
        content = bytearray((tmp_path / "b" / f"{name}.bin").read_bytes())
        content[101] ^= 1
        (tmp_path / "b" / f"{name}.bin").write_bytes(content)
        assert dataset(tmp_path / "b").fingerprint != first
        content[101] ^= 1
        (tmp_path / "b" / f"{name}.bin").write_bytes(content)


GOLDEN = {                   # runs of before go on with their data, and `eval` finds it, by these
    (): "aff15f285db6bd46e0e0df8525305618f0d592cde6e6f0a5797a5c16f45640f6",
    ("data.end_token=3100",): "f3487c15147c79bf67dd8409499ec030ec5ec08598ec1f72c41a9b2fb1762997",
    ("data.split=merge",
     "data.held_out_share=0.25"): "64aaf1623818ab27a1d82b93be7cbded5611a85fba5b133d7c8e56cc101b0256",
}


@pytest.mark.parametrize("overrides", GOLDEN)
def test_the_fingerprint_is_that_of_all_versions(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    for number, (name, (write, suffix, _)) in enumerate(WRITERS.items()):
        folder = tmp_path / f"domain{number % 3}"
        folder.mkdir(exist_ok=True)
        content = np.arange(number, 4000 * (number + 1)) * 31 % GPT2
        write(folder / f"{number}_{'val' if number == 3 else 'train'}{suffix}", content)
    assert dataset(tmp_path, *overrides).fingerprint == GOLDEN[overrides]


def test_a_file_that_changes_while_it_is_in_use_is_refused(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    nanogpt(tmp_path / "store", ids(0, 3000))
    (tmp_path / "a.bin").symlink_to(tmp_path / "store")      # as a hub's cache lays files out
    data = dataset(tmp_path / "a.bin")
    assert data.train_stream.read(5, 3).tolist() == ids(0, 3000)[5:8].tolist()
    monkeypatch.setattr(token_blocks, "LOOK_S", 0.0)
    os.utime(tmp_path / "store", ns=(0, 1))                  # touched, not changed
    assert data.train_stream.read(5, 3).tolist() == ids(0, 3000)[5:8].tolist()
    with open(tmp_path / "store", "r+b") as file:
        file.write(b"\7")
    os.utime(tmp_path / "store", ns=(0, 2))
    with pytest.raises(DataError, match="E-DATA-122"):
        data.train_stream.read(5, 3)
    os.truncate(tmp_path / "store", 100)                     # mapped into memory it would be SIGBUS
    with pytest.raises(DataError, match="E-DATA-122") as caught:
        data.train_stream.read(2000, 3)
    assert caught.value.where == str(tmp_path / "a.bin")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(files=strategies.lists(strategies.tuples(strategies.sampled_from(["a", "b", "c/x"]),
                                                strategies.sampled_from(sorted(WRITERS)),
                                                strategies.lists(strategies.integers(0, 90), min_size=1,
                                                                 max_size=6)), min_size=1, max_size=5),
       share=strategies.sampled_from([0.05, 0.1, 0.5]), marked=strategies.booleans())
def test_every_token_is_trained_on_or_held_out_once(tmp_path_factory, files, share: float,
                                                    marked: bool) -> None:
    folder, written = tmp_path_factory.mktemp("any"), {}
    for number, (domain, name, lengths) in enumerate(files):
        write, suffix, _ = WRITERS[name]
        content = end_of_documents(documents(number, lengths, 255), 255)
        path = folder / f"{domain}-{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        write(path, content)
        written.setdefault(domain[0], []).append(content)
    total = sum(map(len, sum(written.values(), [])))
    overrides = [f"data.held_out_share={share}", "data.vocab_size=256",
                 *(["data.end_token=255"] if marked else [])]
    if all(sum(map(len, contents)) * share < 1 for contents in written.values()):
        assert refused(folder, *overrides).id == "E-DATA-074"
        return
    data = dataset(folder, *overrides)
    assert (data.domains == tuple(sorted(written))
            and data.train_stream.size + data.heldout_stream.size == total)
    for number, domain in enumerate(data.domains):
        parts = []
        for stream in (data.train_stream, data.heldout_stream):
            begin, end = stream.domain_range(number)
            whole = stream.read(begin, end - begin).astype(np.int64)
            parts.append(whole)
            for start in range(begin, end, 37):              # reads across documents and files
                length = min(53, end - start)
                assert (stream.read(start, length) == whole[start - begin:start - begin + length]).all()
        assert sorted(np.concatenate(parts).tolist()) == sorted(np.concatenate(written[domain]).tolist())
        if marked:  # a document begins behind an end token, or with a file
            starts = [s for s in data.train_stream.document_starts.tolist()
                      if data.train_stream.domain_range(number)[0] < s
                      < data.train_stream.domain_range(number)[1]]
            assert all(data.train_stream.read(start - 1, 1)[0] == 255 for start in starts)


def test_llama_3_files_need_their_vocabulary(tmp_path: Path) -> None:
    llmc(tmp_path / "a.bin", np.append(ids(0, 300), LLAMA - 1), LLAMA_3)
    assert refused(tmp_path / "a.bin").id == "E-DATA-073"
    assert dataset(tmp_path / "a.bin", f"data.vocab_size={LLAMA}").vocab_size == LLAMA


@pytest.mark.slow
def test_a_run_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    common = [*DEBUG, "data=memmap", "data.path=train.bin", "data.vocab_size=300", "run.steps=5",
              "log.wandb=off"]
    nanogpt(tmp_path / "train.bin", ids(0, 4000, 300))
    nanogpt(tmp_path / "val.bin", ids(1, 500, 300))

    def moetrain(*words: str, code: int = 0) -> str:
        done = warm_start.run([sys.executable, "-m", "moetrain", *words], cwd=tmp_path, env=environment(),
                              text=True, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == code, done.stdout
        return done.stdout

    assert "val.bin" in moetrain("train", *common, "run.name=whole")
    moetrain("train", *common, "run.name=broken", "run.stop_at=3")
    moetrain("train", *common, "run.name=broken")
    whole, broken = tmp_path / "runs/whole", tmp_path / "runs/broken"
    assert numbers(broken) == numbers(whole) and len(numbers(whole)) == 5
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "train.bin").write_bytes(content)            # other data: the run does not go on with it
    assert "E-DATA-062" in moetrain("train", *common, "run.name=broken", "run.steps=6", code=12)


def test_a_tokenizer_json_brings_vocabulary_end_token_and_text(tmp_path: Path) -> None:
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, vocab_size=300,
                                special_tokens=["<pad>", "<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    stories = [f"the lazy dog {number} jumps" for number in range(40)]
    nanogpt(tmp_path / "a.bin", end_of_documents([np.array(library.encode(story).ids) for story in stories],
                                                 1))
    named = f"data.tokenizer={tmp_path / 'tokenizer.json'}"
    data = dataset(tmp_path / "a.bin", named)
    assert data.vocab_size == library.get_vocab_size() and data.tokenizer.end_id == 1
    bounds = [*data.train_stream.document_starts.tolist(), data.train_stream.size]
    read = [data.tokenizer.decode(data.train_stream.read(a, b - a).tolist())
            for a, b in zip(bounds, bounds[1:])]
    assert read == stories[:len(read)] and len(read) == 38 and data.train_stream.text_bytes(0, 9) is None
    typed = dataset(tmp_path / "a.bin", named, "data.end_token=<|endoftext|>")
    assert typed.fingerprint == data.fingerprint and typed.train_stream.size == data.train_stream.size
    assert refused(tmp_path / "a.bin", named, "data.end_token=<pad>").id == "E-DATA-163"

"""Payload files: other tools read them, a checksum covers every byte, and no content can do harm."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moetrain.checkpoint.commit import commit, write_rank
from moetrain.checkpoint.manifest import NAME, read_manifest
from moetrain.checkpoint.payload import Payload, TensorRows, header, metadata, write_payload
from moetrain.checkpoint.records import BLOCK, ITEM_BYTES, ByteRange
from moetrain.checkpoint.verify import is_sound, problems
from moetrain.errors import CheckpointError
from moetrain.parallel.state_shards import DTYPE_NAMES, DTYPES
from moetrain.train.checkpoint.load import load, resume
from moetrain.train.checkpoint.snapshot import as_bytes
from tests.support.checkpoints import SIZES, SMALL, flip, payload, saved, tensors, trained
from tests.support.training import make_run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run with checkpoints of steps 1 and 2, of the smallest model."""
    run_dir, run = tmp_path_factory.mktemp("small"), trained(1, SMALL)
    saved(run, run_dir, 1)
    run.state.model.embed.data += 1
    saved(run, run_dir, 2)
    return run_dir


@pytest.fixture
def run_dir(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "run"))


def newest_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints/step-00000002"


def test_any_tool_can_read_the_files(two_steps):
    run, directory = two_steps
    found = safetensors.torch.load_file(payload(directory))
    truth = tensors(run.state)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    with safetensors.safe_open(payload(directory), "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "2", "file": "rank-0000.safetensors"}


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (2, 1, 3)])
def test_every_dtype_and_shape_round_trips(tmp_path, dtype, shape):
    """Scalars, bfloat16, float8, bool and a tensor that is not contiguous included."""
    tensor = (torch.randn(shape) * 10).to(dtype) if shape != (5, 3) else (torch.randn(3, 5) * 10).to(dtype).T
    item = TensorRows("x", DTYPE_NAMES[dtype], shape, 0, shape[0] if shape else 1,
                      as_bytes(tensor.contiguous()))
    directory = tmp_path / "checkpoints/step-00000001"
    write_rank(directory.with_suffix(".tmp-1"), 0, [item], 1)
    commit(directory.with_suffix(".tmp-1"), directory, ranks=1, facts={}, values={"step": 1, "tokens": 1})
    found = safetensors.torch.load_file(payload(directory))["x"]
    assert found.dtype == dtype and found.shape == shape and bytes(as_bytes(found)) == bytes(item.content)
    assert ITEM_BYTES[DTYPE_NAMES[dtype]] == dtype.itemsize and list(problems(directory)) == []


def test_tensors_lie_aligned_whatever_they_are(tmp_path):
    items = [TensorRows(f"{index}", dtype, (3,), 0, 3, memoryview(bytes(3 * ITEM_BYTES[dtype])))
             for index, dtype in enumerate(["U8", "F64", "BF16", "F32", "BOOL", "I64"])]
    _, rows = write_payload(tmp_path / "rank-0000.safetensors", items, 1)
    assert all(begin % ITEM_BYTES[dtype] == 0 for _, dtype, _, begin, *_ in rows)
    safetensors.torch.load_file(tmp_path / "rank-0000.safetensors")


def test_a_long_tensor_has_a_checksum_for_every_block_and_rows_are_read_alone(tmp_path):
    content = random.Random(0).randbytes(1000)
    item = TensorRows("x", "U8", (100, 10), 0, 100, memoryview(content))
    file, rows = write_payload(tmp_path / "rank-0000.safetensors", [item], 1, block=64)
    assert len(rows[0][6:]) == 16 and BLOCK == 64 << 20
    part = ByteRange(rows[0][3], 1000, "x", "U8", (100, 10), tuple(rows[0][6:]))
    for begin, end in ((0, 1000), (0, 1), (63, 65), (640, 640), (120, 500), (990, 1000)):
        for check in (True, False):
            with Payload(tmp_path / "rank-0000.safetensors", file) as opened:
                assert b"".join(opened.blocks(part, 64, begin, end, check)) == content[begin:end]
    flip(tmp_path / "rank-0000.safetensors", part.begin + 130)
    with Payload(tmp_path / "rank-0000.safetensors", file) as opened:
        # Blocks 0 and 1 are sound.
        assert b"".join(opened.blocks(part, 64, 0, 128)) == content[:128]
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            # Block 2 is damaged, so none of its bytes is returned.
            list(opened.blocks(part, 64, 191, 192))


# --- changed bits


def places(directory: Path, draw: random.Random, number: int) -> list[tuple[str, int]]:
    """Choose random bytes of the content, of header and padding, and of the manifest."""
    head = read_manifest(directory).files["rank-0000.safetensors"].header
    size, manifest = payload(directory).stat().st_size, (directory / NAME).stat().st_size
    spaces = [index for index, byte in enumerate(payload(directory).read_bytes()[:head]) if byte == 0x20]
    kinds = [lambda: ("rank-0000.safetensors", draw.randrange(head, size)),
             lambda: ("rank-0000.safetensors", draw.randrange(head)),
             lambda: (NAME, draw.randrange(manifest)), lambda: (NAME, draw.randrange(10)),
             lambda: ("rank-0000.safetensors", draw.randrange(8)),
             lambda: ("rank-0000.safetensors", draw.choice(spaces) if spaces else head - 1)]
    return [kinds[index % len(kinds)]() for index in range(number)]


def test_two_hundred_flipped_bits_are_all_found_and_the_file_is_named(run_dir):
    draw, run = random.Random(0), make_run(SMALL)
    directory = newest_of(run_dir)
    for name, place in places(directory, draw, 200):
        bit = draw.randrange(8)
        flip(directory / name, place, bit)
        found = list(problems(directory))
        assert [error.where for error in found] == [str(directory / name)], (name, place, bit)
        with pytest.raises(CheckpointError) as caught:
            load(run.state, directory)
        assert caught.value.where == str(directory / name) and caught.value.code == 13
        flip(directory / name, place, bit)
    assert list(problems(directory)) == []
    load(run.state, directory)


def test_the_tensor_with_the_flipped_bit_is_named(run_dir):
    directory = newest_of(run_dir)
    for part in read_manifest(directory).parts()["rank-0000.safetensors"]:
        flip(payload(directory), part.begin + part.length - 1)
        (error,) = problems(directory)
        assert error.why.startswith(f"{part.key} (bytes {part.begin} to ")
        flip(payload(directory), part.begin + part.length - 1)


# --- exchanged and missing files


def swap(run_dir: Path) -> None:
    """Exchange the files of two steps, which have equal names and sizes and are sound by themselves."""
    one, two = (payload(run_dir / f"checkpoints/step-0000000{step}") for step in (1, 2))
    assert one.stat().st_size == two.stat().st_size
    one.rename(one.with_name("x")), two.rename(one), one.with_name("x").rename(two)


HARM = {
    "truncated": (lambda d: payload(d).write_bytes(payload(d).read_bytes()[:-8]), "bytes long"),
    "longer": (lambda d: payload(d).write_bytes(payload(d).read_bytes() + bytes(8)), "bytes long"),
    "empty": (lambda d: payload(d).write_bytes(b""), "0 bytes long"),
    "missing": (lambda d: payload(d).unlink(), "missing"),
    "zeros": (lambda d: payload(d).write_bytes(bytes(payload(d).stat().st_size)), "header"),
    "a directory": (lambda d: (payload(d).unlink(), payload(d).mkdir()), "a folder, not a file"),
    "a link": (lambda d: payload(d).rename(d.parent / "elsewhere")
               and payload(d).symlink_to(d.parent / "elsewhere"), "cannot be opened"),
    "a pipe": (lambda d: (payload(d).unlink(), os.mkfifo(payload(d))), "a named pipe, not a file"),
    "extra shard": (lambda d: shutil.copy(payload(d), d / "rank-0001.safetensors"), "does not belong"),
    "extra file": (lambda d: (d / "optimizer.pt").write_bytes(b"\x80"), "does not belong"),
    "extra directory": (lambda d: (d / "more").mkdir(), "does not belong"),
    "swapped between steps": (lambda d: swap(d.parents[1]), "of another step"),
}


@pytest.mark.parametrize("case", HARM)
def test_harm_to_files_is_found_by_sizes_alone_named_and_passed_over(run_dir, case):
    harm, why = HARM[case]
    directory = newest_of(run_dir)
    assert is_sound(directory)
    harm(directory)
    assert not is_sound(directory)
    (error,) = problems(directory)
    assert why in error.why and Path(error.where).parent == directory
    run = make_run(SMALL)
    if case == "swapped between steps":
        with pytest.raises(CheckpointError, match="E-CHECKPOINT-004"):
            resume(run.state, run_dir, run.mesh)
    else:
        assert resume(run.state, run_dir, run.mesh, verify="sizes").path.name == "step-00000001"


def test_hidden_files_are_left_alone_and_named(run_dir, caplog):
    """File systems and file managers create them; they are never opened."""
    (newest_of(run_dir) / ".nfs0001").write_bytes(b"\x80\x04.")
    run = make_run(SMALL)
    with caplog.at_level(logging.WARNING):
        assert resume(run.state, run_dir, run.mesh).path == newest_of(run_dir)
    assert ".nfs0001 does not belong to the checkpoint; it is ignored" in caplog.text


def test_a_header_that_tells_other_tools_something_else_is_refused(run_dir):
    """All checksums are correct, but the header exchanges the names of two tensors of one size."""
    directory = newest_of(run_dir)
    manifest = read_manifest(directory)
    parts = manifest.parts()["rank-0000.safetensors"]
    one, two = [index for index, part in enumerate(parts) if part.shape == (16, 8)][:2]
    parts[one], parts[two] = parts[one]._replace(key=parts[two].key), parts[two]._replace(key=parts[one].key)
    head = header(parts, metadata("rank-0000.safetensors", 2))
    content = bytearray(payload(directory).read_bytes())
    content[:len(head)] = head
    payload(directory).write_bytes(content)
    file = manifest.files["rank-0000.safetensors"]
    manifest.files["rank-0000.safetensors"] = file._replace(crc=zlib.crc32(head))
    (directory / NAME).write_bytes(manifest.encode())
    assert is_sound(directory)
    (error,) = problems(directory)
    assert "does not list the tensors of the manifest" in error.why
    with pytest.raises(CheckpointError, match="does not list the tensors"):
        load(make_run(SMALL).state, directory)


# --- pickles

CANARY = """
import os, pickle, sys
from pathlib import Path
import torch

directory, canary = Path(sys.argv[1]), sys.argv[2]

class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {canary}",)

bombs = [pickle.dumps(Bomb())]
torch.save(Bomb(), "bomb.pt")
bombs.append(Path("bomb.pt").read_bytes())

seen = []
watched = ("pickle.find_class", "os.system")
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)) if event in watched else None)

from moetrain.errors import CheckpointError
from moetrain.train.checkpoint.load import load, resume
from moetrain.checkpoint.verify import problems
from tests.support.training import make_run
from tests.support.checkpoints import SMALL

run = make_run(SMALL)
seen.clear()
load(run.state, directory)
names = [path.name for path in directory.iterdir()] + [".metadata", "extra.pt", "index-0000.json"]
refused = 0
for name in names:
    path = directory / name
    before = path.read_bytes() if path.exists() else None
    for bomb in bombs:
        # As a whole file; below a correct checksum; and in place of a tensor's bytes, so that
        # the file keeps its size.
        import zlib
        tail = (before or b"")[:max(0, len(before or b"") - len(bomb))] + bomb
        for content in (bomb, b"%08x\\n" % zlib.crc32(bomb) + bomb, tail):
            path.write_bytes(content)
            refused += next(problems(directory), None) is not None
            try:
                load(run.state, directory)
            except CheckpointError:
                pass
    path.write_bytes(before) if before is not None else path.unlink()
load(run.state, directory)
assert not seen, seen
assert not os.path.exists(canary)
pickle.loads(bombs[0])                                   # the bomb is live, and the hook sees it
assert os.path.exists(canary) and {event for event, _ in seen} == {"pickle.find_class", "os.system"}
print(refused)
"""


@pytest.mark.slow
def test_nothing_is_unpickled_whatever_lies_in_a_checkpoint(run_dir, tmp_path):
    """A live pickle stands in every file: as the whole file, as the manifest's body, as a tensor's bytes."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CANARY, newest_of(run_dir), tmp_path / "canary"],
                          cwd=tmp_path, text=True,
                          env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4 * 6                     # all but the hidden file, which is ignored unread


def test_the_records_of_a_checkpoint_are_json(two_steps):
    raw = json.loads((two_steps[1] / NAME).read_bytes().partition(b"\n")[2])
    assert list(raw) == ["version", "facts", "values", "block", "files", "tensors", "experts"]
    assert raw["values"] == {"step": 2, "tokens": two_steps[0].state.tokens}


def test_one_run_does_not_load_into_another_of_equal_names(two_steps):
    """The state is erased before it is loaded, so a tensor that the file does not hold would be noticed."""
    other = make_run([*SIZES, "run.seed=5"])
    for shard in other.state.state_shards():
        shard.rows.fill_(float("nan"))
    load(other.state, two_steps[1])
    assert all(torch.isfinite(shard.rows).all() for shard in other.state.state_shards())

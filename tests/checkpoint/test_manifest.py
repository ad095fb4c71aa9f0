"""Reading any manifest returns a valid one or raises a CheckpointError that names the violated rule.

The hostile manifests here have a correct checksum, as an attacker would write it.
"""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetrain.checkpoint.manifest import NAME, checkpoints_of, is_damage, newest, read_manifest, step_of
from moetrain.checkpoint.records import split_expert
from moetrain.errors import CheckpointError
from tests.support.checkpoints import SMALL, saved, trained
from tests.support.odd_files import ODD, make_odd

EMBED, EXPERTS = "model.embed", "model.layers.0.moe.experts.*.gate_up"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(trained(1, SMALL), tmp_path_factory.mktemp("original"))


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / NAME).read_bytes().partition(b"\n")[2])


def read_as(tmp_path: Path, body: bytes) -> CheckpointError:
    """Read a manifest with this body and a correct checksum; returns the error."""
    (tmp_path / NAME).write_bytes(b"%08x\n%b" % (zlib.crc32(body), body))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert caught.value.id == "E-CHECKPOINT-001" and caught.value.where == str(tmp_path / NAME)
    return caught.value


def test_what_is_written_is_what_is_read(original):
    manifest = read_manifest(original)
    assert manifest.encode() == (original / NAME).read_bytes()
    assert manifest.values["step"] == 1 and manifest.entry(EMBED).shape == (16, 8)
    assert manifest.entry(EXPERTS.replace("*", "1")).shape == (16, 8)
    assert manifest.entry(EXPERTS.replace("*", "2")) is None
    assert (len(list(manifest.names())) == len(set(manifest.names()))
            == sum(map(len, manifest.parts().values())))


def put(*path: str | int, value: Any) -> Callable[[dict], None]:
    def edit(raw: dict) -> None:
        *before, last = path
        for key in before:
            raw = raw[key]
        raw[last] = value(raw[last]) if callable(value) else value
    return edit


FILE = "rank-0000.safetensors"
HOSTILE = {
    "another version": (put("version", value=99), "version 99"),
    "no version": (lambda raw: raw.pop("version"), "version None"),
    "no files": (lambda raw: raw.pop("files"), "KeyError"),
    "facts are a list": (put("facts", value=[]), "facts is not an object"),
    "step is text": (put("values", "step", value="1"), "step or tokens"),
    "step is true": (put("values", "step", value=True), "step or tokens"),
    "step is negative": (put("values", "step", value=-1), "step or tokens"),
    "no tokens": (lambda raw: raw["values"].pop("tokens"), "step or tokens"),
    "block of zero": (put("block", value=0), "block size"),
    "tiny block": (put("block", value=1), "wrong number of checksums"),
    "file outside": (lambda raw: raw["files"].update({"../rank-0000.safetensors": [100, 50, 0]}),
                     "no save writes"),
    "absolute file": (lambda raw: raw["files"].update({"/etc/passwd": [100, 50, 0]}), "no save writes"),
    "hidden file": (lambda raw: raw["files"].update({".metadata": [100, 50, 0]}), "no save writes"),
    "pickle file": (lambda raw: raw["files"].update({"rank-0000.pt": [100, 50, 0]}), "no save writes"),
    "manifest as file": (lambda raw: raw["files"].update({NAME: [100, 50, 0]}), "no save writes"),
    "file with newline": (lambda raw: raw["files"].update({FILE + "\n": [100, 50, 0]}), "no save writes"),
    "header larger than file": (put("files", FILE, 1, value=1 << 40), "impossible size"),
    "header of 200 MB": (put("files", FILE, value=[1 << 30, 200 << 20, 0]), "impossible size"),
    "no header": (put("files", FILE, 1, value=8), "impossible size"),
    "size is float": (put("files", FILE, 0, value=1e3), "not numbers"),
    "size too large": (put("files", FILE, 0, value=lambda size: size + 1), "bytes long, not"),
    "size too small": (put("files", FILE, 0, value=lambda size: size - 1), "bytes long, not"),
    "unknown dtype": (put("tensors", EMBED, 0, value="C64"), "unknown dtype"),
    "dtype is a list": (put("tensors", EMBED, 0, value=["F32"]), "unknown dtype"),
    "wider dtype": (put("tensors", EMBED, 0, value="F64"), "belong to"),
    "dims overflow": (put("tensors", EMBED, 1, value=[1 << 40, 1 << 40]), "larger than any disk"),
    "dims overflow through zero": (put("tensors", EMBED, 1, value=[1 << 62, 0, 1 << 62]),
                                   "larger than any disk"),
    "negative dim": (put("tensors", EMBED, 1, value=[-16, -8]), "impossible shape"),
    "many dims": (put("tensors", EMBED, 1, value=[1] * 100), "impossible shape"),
    "fewer rows": (put("tensors", EMBED, 1, value=[15, 8]), "model.embed has 16 rows of 15"),
    "more rows": (put("tensors", EMBED, 1, value=[17, 8]), "model.embed has 16 rows of 17"),
    "no rows": (put("tensors", EMBED, 1, value=[0, 8]), "model.embed has 16 rows of 0"),
    "no chunk": (put("tensors", EMBED, 2, value=[]), "model.embed has 0 rows of 16"),
    "chunk twice": (put("tensors", EMBED, 2, value=lambda chunks: chunks * 2), "missing or there twice"),
    "chunk in no file": (put("tensors", EMBED, 2, 0, 0, value=1), "not listed"),
    "begins inside another": (put("tensors", EMBED, 2, 0, 1, value=lambda begin: begin + 4), "belong to"),
    "begins in the header": (put("tensors", EMBED, 2, 0, 1, value=0), "belong to"),
    "begins behind the end": (put("tensors", EMBED, 2, 0, 1, value=1 << 50), "belong to"),
    "negative begin": (put("tensors", EMBED, 2, 0, 1, value=-4), "not made of numbers"),
    "begin is true": (put("tensors", EMBED, 2, 0, 1, value=True), "not made of numbers"),
    "begin beyond 64 bits": (put("tensors", EMBED, 2, 0, 1, value=1 << 70), "not made of numbers"),
    "no checksum": (put("tensors", EMBED, 2, 0, value=lambda chunk: chunk[:4]), "wrong number of checksums"),
    "checksum too large": (put("tensors", EMBED, 2, 0, 4, value=1 << 32), "wrong number of checksums"),
    "chunk is text": (put("tensors", EMBED, 2, 0, value="01234"), "not made of numbers"),
    "tensor is a number": (put("tensors", EMBED, value=3), "TypeError"),
    "tensor dropped": (lambda raw: raw["tensors"].pop(EMBED), "belong to nothing"),
    "expert dropped": (lambda raw: raw["experts"][EXPERTS][2].pop(), "belong to nothing"),
    "expert twice": (lambda raw: raw["experts"][EXPERTS][2].append(raw["experts"][EXPERTS][2][0]),
                     "two tensors"),
    "expert also alone": (
        lambda raw: raw["tensors"].update({EXPERTS.replace("*", "0"): ["F32", [16, 8], [[0, 0, 0, 16, 0]]]}),
                          "there twice"),
    "experts of nothing": (lambda raw: raw["experts"].update({"x.experts.*.up": ["F32", [0], [[0, 0]]]}),
                           "no content"),
    "experts without star": (lambda raw: raw["experts"].update({"model.x": ["F32", [2], [[0, 0, 0]]]}),
                             "names no experts"),
    "experts with two stars": (
        lambda raw: raw["experts"].update({"*.experts.*.up": ["F32", [2], [[0, 0, 0]]]}),
                               "names no experts"),
    "an expert is no list": (put("experts", EXPERTS, 2, 0, value=7), "not made of numbers"),
    "experts are an object": (put("experts", EXPERTS, 2, value={"0": 1}), "no content"),
    "name too long": (lambda raw: raw["tensors"].update({"x" * 600: ["F32", [0], []]}),
                      "no name of a tensor"),
    "name with control characters": (lambda raw: raw["tensors"].update({"\x1b[2J": ["F32", [0], []]}),
                                     "no name of a tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_lies_is_refused(original, tmp_path, case):
    edit, why = HOSTILE[case]
    raw = record(original)
    edit(raw)
    assert why in read_as(tmp_path, json.dumps(raw).encode()).why


@pytest.mark.parametrize("body, why", [
    (b"", "not a manifest"), (b"[]", "not a JSON object"), (b"{", "not a manifest"),
    (b"\xff\xfe", "not a manifest"),
    (b"[" * 200_000, "not a manifest"), (b'{"a":' * 200_000, "not a manifest"),
    (b'{"version":2,"version":2}', "names something twice"),
    (b'{"version":NaN}', "NaN is not a number"), (b'{"version":-Infinity}', "is not a number"),
    (b'{"version":' + b"9" * 100_000 + b"}", "not a manifest"),
    (b"cos\nsystem\n(S'true'\ntR.", "not a manifest"),
], ids=range(11))
def test_what_is_no_json_is_refused(tmp_path, body, why):
    assert why in read_as(tmp_path, body).why


def test_one_tensor_named_twice_is_refused(original, tmp_path):
    body = json.dumps(record(original)).encode()
    assert "names something twice" in read_as(tmp_path, body.replace(b'"model.head"', b'"model.embed"')).why


@pytest.mark.parametrize("content", [b"", b"\n", b"00000000\n", b"{}", b"\x80\x04."])
def test_a_wrong_checksum_is_refused(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


def test_a_manifest_longer_than_any_is_not_read(tmp_path):
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(1 << 40)                           # sparse
    with pytest.raises(CheckpointError, match="longer than"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("/etc/passwd"),
                                  lambda path: __import__("os").mkfifo(path), lambda path: None])
def test_a_manifest_that_is_no_ordinary_file_is_refused(tmp_path, make):
    """Reading a pipe would wait forever, and a link leads out of the run."""
    make(tmp_path / NAME)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


def test_mutated_manifests_are_right_or_refused(original, tmp_path):
    """After 500 changes of bytes and values, all with a correct checksum, no other exception is raised."""
    body = (original / NAME).read_bytes().partition(b"\n")[2]
    draw, read = random.Random(0), 0
    for _ in range(500):
        mutated = mutate(body, draw)
        (tmp_path / NAME).write_bytes(b"%08x\n%b" % (zlib.crc32(mutated), mutated))
        try:
            manifest = read_manifest(tmp_path)
        except CheckpointError as error:
            assert error.id == "E-CHECKPOINT-001"
            continue
        read += 1
        for name, parts in manifest.parts().items():
            end = manifest.files[name].header
            for part in parts:
                assert part.begin == end
                end += part.length
            assert end == manifest.files[name].size
    # Changed checksums and facts pass unnoticed here; changed places do not.
    assert 0 < read < 400


def mutate(body: bytes, draw: random.Random) -> bytes:
    kind, content = draw.randrange(5), bytearray(body)
    place = draw.randrange(len(body))
    match kind:
        case 0:
            content[place] ^= 1 << draw.randrange(8)
        case 1:
            del content[place:place + draw.randrange(1, 40)]
        case 2:
            content[place:place] = draw.choice(
                [b"0", b"-1", b"[", b"}", b",", b'"', b"null", b"1e9", b"\x00"])
        case 3:
            other = draw.randrange(len(body))
            content[place:place + 20] = body[other:other + 20]
        case 4:
            digits = [index for index, byte in enumerate(content) if chr(byte).isdigit()]
            content[draw.choice(digits)] = ord(draw.choice("0123456789"))
    return bytes(content)


def test_what_has_the_name_of_a_step_counts(tmp_path):
    for name in ("step-00000007", "step-00000011", "step-00000020.tmp-1", "step-00000030.damaged", "step-5",
                 "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000007", "step-00000011"]
    assert step_of(newest(tmp_path)) == 11
    assert newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name, expected", [
    ("model.layers.0.moe.experts.5.gate_up", ("model.layers.0.moe.experts.*.gate_up", 5)),
    ("optim.layers.10.moe.experts.255.down.exp_avg", ("optim.layers.10.moe.experts.*.down.exp_avg", 255)),
    ("model.layers.0.moe.shared.down", None), ("model.layers.0.moe.experts.05.down", None),
    ("experts.5.down", None),
])
def test_experts_are_known_by_name(name, expected):
    assert split_expert(name) == expected


def test_a_checkpoint_under_the_name_of_another_step_is_damage(original, tmp_path):
    for name, fits in (("step-00000003", False), ("elsewhere", True)):
        directory = tmp_path / name
        directory.mkdir()
        (directory / NAME).write_bytes((original / NAME).read_bytes())
        if fits:
            assert read_manifest(directory).values == read_manifest(original).values
        else:
            with pytest.raises(CheckpointError, match="of another step"):
                read_manifest(directory)


@pytest.mark.parametrize("kind", [*ODD, "link", "missing"])
def test_a_manifest_that_is_no_file_of_its_own_is_damage(checkpoint, kind):
    path = checkpoint / NAME
    path.rename(path.with_name("elsewhere"))
    what = "a link" if kind == "link" else "No such file" if kind == "missing" else make_odd(path, kind)
    if kind == "link":
        path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(CheckpointError) as refused:
        read_manifest(checkpoint)
    what = "a link" if kind in ("circle", "nowhere", "device", "linked fifo") else what
    assert is_damage(refused.value) and what in refused.value.why and refused.value.where == str(path)


def test_a_step_that_is_a_link_is_damage_and_a_link_of_ones_own_name_is_not(checkpoint):
    outside = checkpoint.parents[2] / "outside"
    checkpoint.rename(outside)
    checkpoint.symlink_to(outside)
    with pytest.raises(CheckpointError, match="it is a link, not a directory of the run"):
        read_manifest(checkpoint)
    (checkpoint.parent / "mine").symlink_to(outside)
    assert read_manifest(checkpoint.parent / "mine").values["step"] == 2

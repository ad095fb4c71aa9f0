"""Archives of torch.save against torch.load."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from moetrain.interop.dcp.pickles import PickleError
from moetrain.interop.dcp.records import ELEMENT_BYTES, TORCH_DTYPES
from moetrain.interop.dcp.torch_zip import read_zipped_tensor


def saved(value: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def read(content: bytes, begin: int = 0, length: int | None = None):
    length = len(content) - begin if length is None else length
    return read_zipped_tensor(lambda first, count: content[first:first + count], begin, length)


def words(content: bytes) -> np.ndarray:
    """Elements of the tensor in an archive as unsigned numbers."""
    view = read(content)
    size = ELEMENT_BYTES[view.dtype]
    return np.ndarray(view.shape, f"u{size}", content, view.begin, [stride * size for stride in view.strides])


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_every_dtype(name):
    dtype = getattr(torch, name)
    tensor = torch.arange(6).to(torch.float32).to(dtype).reshape(2, 3)
    view = read(saved(tensor))
    assert (view.dtype, view.shape, view.strides) == (TORCH_DTYPES[name], (2, 3), (3, 1))
    expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert words(saved(tensor)).tobytes() == expected


def test_views_of_a_storage_and_scalars():
    whole = torch.arange(24, dtype=torch.int32)
    for tensor in (whole.view(4, 6).T, whole[5:], whole.view(2, 3, 4)[1, :, 2], whole[3], whole[:0]):
        np.testing.assert_array_equal(words(saved(tensor)), tensor.numpy())


class Planted:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


def rewritten(content: bytes, change=lambda name, data: data, method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with other entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w", method) as target:
        for entry in source.infolist():
            data = change(entry.filename.partition("/")[2], source.read(entry))
            if data is not None:
                target.writestr(entry.filename, data)
    return file.getvalue()


def test_a_planted_command_and_other_objects_are_refused(tmp_path):
    canary, tensor = tmp_path / "canary", torch.zeros(3)
    for value, fault in (({"a": tensor}, "does not build one tensor"), (Planted(canary), "exec"),
                         (torch.nn.Linear(1, 1), "torch.nn"), (tensor.to_sparse(), "sparse")):
        with pytest.raises(PickleError, match=fault):
            read(saved(value))
    assert not canary.exists()


@pytest.mark.parametrize("change, fault", [
    (lambda name, data: b"big" if name == "byteorder" else data, "little-endian"),
    (lambda name, data: None if name == "data.pkl" else data, "holds no data.pkl"),
    (lambda name, data: None if name == "data/0" else data, "holds no data/0"),
    (lambda name, data: data[:-4] if name == "data/0" else data, "storage of 20 bytes"),
    (lambda name, data: data.replace(b"K\x06", b"K\x07", 1) if name == "data.pkl" else data, "storage of 24"),
    (lambda name, data: bytes(70_000) if name == "data.pkl" else data, "pickle of one tensor has"),
    (lambda name, data: pickle.dumps(7) if name == "data.pkl" else data, "does not build one tensor"),
])
def test_altered_archives_are_refused(change, fault):
    content = saved(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    with pytest.raises(PickleError, match=fault):
        read(rewritten(content, change))


def test_compressed_truncated_and_old_archives_are_refused():
    content = saved(torch.arange(600, dtype=torch.float32))
    with pytest.raises(PickleError, match="compressed"):
        read(rewritten(content, method=zipfile.ZIP_DEFLATED))
    old = saved(torch.zeros(2), _use_new_zipfile_serialization=False)
    for harmed in (b"", content[:-1], content[:200], old):
        with pytest.raises(PickleError):
            read(harmed)


def test_a_zip64_archive_between_other_bytes():
    tensor, file = torch.arange(5, dtype=torch.int64), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            with target.open(entry.filename, "w", force_zip64=True) as out:
                out.write(source.read(entry))
    inner = file.getvalue()
    view = read(b"x" * 77 + inner + b"y" * 9, 77, len(inner))
    np.testing.assert_array_equal(np.ndarray((5,), "i8", b"x" * 77 + inner, view.begin), tensor.numpy())
    # Numbers at the end of the archive that do not fit into 32 bits, as of one longer than 4 GB.
    place, size = int.from_bytes(inner[-6:-2], "little"), int.from_bytes(inner[-10:-6], "little")
    head = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes(28) + size.to_bytes(8, "little")
    head += place.to_bytes(8, "little")
    locator = b"PK\x06\x07" + bytes(4) + (len(inner) - 22).to_bytes(8, "little") + bytes(4)
    large = inner[:-22] + head + locator + inner[-22:-10] + b"\xff" * 8 + bytes(2)
    assert read(large)._replace(begin=0) == read(inner)._replace(begin=0)


def test_no_prefix_and_no_flipped_byte_does_more_than_fail():
    content = saved(torch.arange(3, dtype=torch.int16))
    for place in range(0, len(content), 3):
        flipped = bytes([content[place] ^ 0x41])
        for harmed in (content[:place], content[:place] + flipped + content[place + 1:]):
            try:
                read(harmed)
            except PickleError:
                pass

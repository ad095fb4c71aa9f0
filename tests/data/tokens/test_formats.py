"""Files that data=tokens did not write: what they are, and what reads them. No advice removes data."""

import ast
import shlex
from pathlib import Path

import numpy as np
import pytest

import moetrain.data
from moetrain.config.compose import compose
from moetrain.data.preparation.prepared_dataset import open_prepared
from moetrain.data.tokens.formats import how_to_read
from moetrain.errors import DataError
from tests.support.token_writers import WRITERS, llmc, nanogpt

IDS = np.arange(2000) * 7 % 50257


def next_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_prepared(path, verify=True)
    return caught.value.next


@pytest.mark.parametrize("name", WRITERS)
def test_the_tokens_of_another_trainer_are_read_by_memmap(tmp_path: Path, name: str) -> None:
    write, suffix, _ = WRITERS[name]
    folder = tmp_path / "their data"
    folder.mkdir()
    write(folder / f"train{suffix}", IDS)
    for path in (folder / f"train{suffix}", folder):
        typed = shlex.split(next_of(path))
        assert typed == ["data=memmap", f"data.path={path}"]
        assert compose(typed).data.path == str(path)             # it can be typed


def test_text_and_indexed_data_are_read_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely")
    assert next_of(tmp_path / "a.txt") == f"data=text data.path={tmp_path / 'a.txt'}"
    (tmp_path / "b.idx").write_bytes(b"MMIDIDX\0\0" + bytes(30))
    nanogpt(tmp_path / "b.bin", IDS)
    assert (next_of(tmp_path / "b.bin") == next_of(tmp_path / "b.idx")
            == f"data=megatron data.path={tmp_path / 'b'}")
    llmc(tmp_path / "c.dat", IDS)
    assert "data=memmap" in next_of(tmp_path / "c.dat")
    IDS.astype("<u2").tofile(tmp_path / "d.dat")                # nothing tells what this is
    assert how_to_read(tmp_path / "d.dat") is None and "data=text prepared" in next_of(tmp_path / "d.dat")
    (tmp_path / "empty").mkdir()
    assert "dataset.json" in next_of(tmp_path / "empty")


def test_no_error_about_data_tells_a_user_to_remove_something() -> None:
    for path in sorted(Path(moetrain.data.__file__).parent.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            for advice in (keyword.value for keyword in call.keywords if keyword.arg == "next"):
                assert not {"remove",
                            "delete"} & set(ast.unparse(advice).lower().split()), (path.name, call.lineno)

"""A directory is there whole or not at all, and takes the place of nothing."""

from pathlib import Path

import pytest

from moetrain.errors import ConfigError, DiskError
from moetrain.transform.destination import new_directory


def test_it_is_there_when_the_block_ends(tmp_path: Path) -> None:
    with new_directory(tmp_path / "some" / "where") as unfinished:
        (unfinished / "file").write_text("whole")
        assert not (tmp_path / "some" / "where").exists()
    assert [path.name for path in (tmp_path / "some").rglob("*")] == ["where", "file"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out") as unfinished:
        (unfinished / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_also_if_it_comes_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("directory", "link"):
        with pytest.raises(ConfigError) as caught, new_directory(tmp_path / name):
            (tmp_path / name).mkdir()
        assert caught.value.id == "E-CONFIG-322"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "link"]


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"), new_directory(tmp_path / "file" / "out"):
        raise AssertionError

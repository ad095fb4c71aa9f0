"""What a run keeps of the public folder that its model was imported from."""

from pathlib import Path

from moetrain.runs.origin import FOLDER, RECORD, keep_origin, origin_of


def test_a_run_keeps_what_its_source_keeps(tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    (source / FOLDER / "preserved").mkdir(parents=True)
    run.mkdir()
    keep_origin(source, run)                                     # without the record there is nothing to keep
    assert origin_of(source) is None and list(run.iterdir()) == []
    (source / FOLDER / RECORD).write_text("{}")
    (source / FOLDER / "preserved" / "tensors").write_bytes(b"abc")
    keep_origin(source, run)
    keep_origin(source, run)                                     # at the start of a second attempt
    assert origin_of(run) == run / FOLDER and [path.name for path in run.iterdir()] == [FOLDER]
    assert (run / FOLDER / "preserved" / "tensors").read_bytes() == b"abc"

"""Token files under several ranks.

Rank 0 alone reads them whole, the others take what it found, and an error on one rank ends all.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.data.loader import build_dataset
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from moetrain.errors import MoETrainError
from moetrain.train import data_setup
from moetrain.train.data_setup import open_on_ranks
from moetrain.train.session import join
from tests.support import needs, warm_start
from tests.support.command_line import DEBUG, environment
from tests.support.indexed_data import build
from tests.support.opened_files import opened_files
from tests.support.token_writers import llmc, nanogpt
from tests.support.training import TINY

VOCAB = 300


class Opened(NamedTuple):
    """What a rank has, or what it left with. first: tokens of the first windows. said: warnings."""

    fingerprint: str
    first: list[list[int]]
    opened: list[str]
    code: int
    error: str
    said: str


def memmap(folder: Path) -> None:
    for number in range(3):
        nanogpt(folder / f"web_{number}.bin", np.random.default_rng(number).integers(0, VOCAB, 3000))
    llmc(folder / "web_val.bin", np.arange(400) % VOCAB)


def megatron(folder: Path) -> None:
    needs.module("megatron.core", extra="megatron")
    for name in ("a", "b"):
        build(folder / name, [[np.append(np.arange(90) + number, 7)] for number in range(30)], np.int32)


KINDS = {"memmap": memmap, "megatron": megatron}


def config_of(root: Path, kind: str, overrides: list[str]) -> Config:
    return compose([*(word for word in TINY if not word.startswith("data")), f"data={kind}",
                    f"data.path={root / 'in'}",
                    f"data.vocab_size={VOCAB}", "parallel=ddp", "run.nproc=2", "train.micro_batch=8",
                    *overrides])


def opened(folder: str, kind: str, overrides: list[str], own_place: bool = False) -> Opened:
    """Open the data on this rank.

    own_place: every rank has a folder of its own for prepared data, as nodes without a common file system do.
    """
    root = Path(folder)
    config = config_of(root, kind, overrides)
    run_dir, said = root / (f"run-{os.environ['RANK']}" if own_place else "run"), []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("moetrain").addHandler(handler)
    found, first, code, error = "", [], 0, ""
    with opened_files(root / "in") as files:
        try:
            mesh = join(config)
            data = open_on_ranks(config, run_dir, mesh, None)
            found, first = data.fingerprint, data.batch(data.sample_ids(1, range(4))).tokens_BS.tolist()
        except MoETrainError as failure:
            code, error = failure.code, failure.id
        except SystemExit as leaving:
            code = leaving.code
        finally:
            logging.getLogger("moetrain").removeHandler(handler)
    return Opened(found, first, files, code, error, "\n".join(said))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "in").mkdir()
    KINDS[request.param](tmp_path / "in")
    return request.param


def whole(kind: str, folder: Path) -> list[str]:
    """The files that rank 0 reads."""
    return sorted(path.name for path in (folder / "in").iterdir())


@pytest.mark.ranks
def test_rank_0_alone_reads_and_all_have_the_same_data(ranks, kind: str, tmp_path: Path) -> None:
    first, second = ranks(2).run(opened, str(tmp_path), kind, [])
    assert (first.code, second.code, first.error + second.error) == (0, 0, "")
    assert first.fingerprint == second.fingerprint and first.first == second.first
    assert first.opened == whole(kind, tmp_path)
    windows = {"memmap": {"web_0.bin", "web_1.bin", "web_2.bin"}, "megatron": {"a.bin", "b.bin"}}[kind]
    # For the windows alone: no .idx, and no held-out file
    assert set(second.opened) <= windows
    again = ranks(2).run(opened, str(tmp_path), kind, [])
    assert ([found[:2] for found in again] == [first[:2]] * 2
            and all(set(found.opened) <= windows for found in again))
    words = [f"data={kind}", f"data.path={tmp_path / 'in'}", f"data.vocab_size={VOCAB}"]
    alone = build_dataset(compose(words), tmp_path, None)
    assert alone.fingerprint == first.fingerprint


@pytest.mark.ranks
def test_an_id_outside_the_vocabulary_ends_all_ranks(ranks, kind: str, tmp_path: Path) -> None:
    first, second = ranks(2).run(opened, str(tmp_path), kind,
                                 ["data.vocab_size=90", *["data.dtype=uint16"] * (kind == "memmap")])
    assert (first.error, first.code, second.error, second.code) == ("E-DATA-073", 12, "", 12)
    assert second.opened == [] and "another rank cannot go on" in second.said


@pytest.mark.ranks
def test_what_contradicts_itself_ends_all_ranks(ranks, tmp_path: Path) -> None:
    """What rank 0 finds out behind the reading."""
    (tmp_path / "in").mkdir()
    memmap(tmp_path / "in")
    (tmp_path / "copy.bin").write_bytes((tmp_path / "in/web_0.bin").read_bytes())
    for overrides, error in (([f"data.held_out={tmp_path}/copy.bin"], "E-DATA-166"),
                             (["data.weights={none: 2}"], "E-DATA-100"),
                             (["data.end_token=300", "data.vocab_size=301"], "E-DATA-163")):
        first, second = ranks(2).run(opened, str(tmp_path), "memmap", overrides)
        assert (first.error, first.code, second.error, second.code) == (error, 12, "", 12)


@pytest.mark.ranks
def test_ranks_without_a_common_folder_are_told_so(ranks, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    memmap(tmp_path / "in")
    first, second = ranks(2).run(opened, str(tmp_path), "memmap", [], True)
    assert (first.error, first.code, second.error, second.code) == ("", 12, "E-DATA-167", 12)
    first, second = ranks(2).run(opened, str(tmp_path), "memmap", [f"data.cache={tmp_path / 'common'}"], True)
    assert first.fingerprint == second.fingerprint and first.code == second.code == 0


def opened_in_between(folder: str) -> Opened:
    """Open the data while another job changes a file and makes its index again.

    Rank 0 has read it by then, the others have not.
    """
    root, told = Path(folder), data_setup.told_by_first

    def meddled(batch, text):
        if batch.position == 0:
            nanogpt(root / "in/web_0.bin", np.arange(3000) % VOCAB)
            build_dataset(config_of(root, "memmap", []), root, None,
                          indexes=TokenIndexes(root / "run/data", use="keep"))
        return told(batch, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_setup, "told_by_first", meddled)
        return opened(folder, "memmap", [])


@pytest.mark.ranks
def test_ranks_never_go_on_with_different_data(ranks, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    memmap(tmp_path / "in")
    first, second = ranks(2).run(opened_in_between, str(tmp_path))
    assert (first.error, first.code, second.error, second.code) == ("", 12, "E-DATA-122", 12)


@pytest.mark.ranks
def test_a_folder_that_rank_0_cannot_write_ends_all(ranks, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    memmap(tmp_path / "in")
    (tmp_path / "run").write_text("a file")
    first, second = ranks(2).run(opened, str(tmp_path), "memmap", [])
    assert (first.error, first.code, second.code) == ("E-DISK-010", 14, 14)


def command(folder: Path, *words: str, code: int = 0) -> str:
    done = warm_start.run([sys.executable, "-m", "moetrain", *words], cwd=folder, env=environment(),
                          text=True, timeout=180,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_run_of_two_ranks_trains_resumes_and_is_evaluated_without_reading_again(tmp_path: Path) -> None:
    """An index that is made again is another file: its time tells."""
    nanogpt(tmp_path / "train.bin", np.random.default_rng(0).integers(0, VOCAB, 4000))
    nanogpt(tmp_path / "val.bin", np.random.default_rng(1).integers(0, VOCAB, 500))
    words = ["train", *DEBUG, "data=memmap", "data.path=train.bin", f"data.vocab_size={VOCAB}",
             "run.nproc=2", "parallel=ep",
             "train.micro_batch=1", "run.steps=4", "log.wandb=off", "run.name=two"]
    command(tmp_path, *words, "run.stop_at=2")
    indexes = sorted((tmp_path / "runs/two/data").iterdir())
    times = [path.stat().st_mtime_ns for path in indexes]
    assert len(indexes) == 2
    command(tmp_path, *words)
    command(tmp_path, "eval", "two")
    assert ([path.stat().st_mtime_ns for path in indexes] == times
            and sorted((tmp_path / "runs/two/data").iterdir()) == indexes)
    losses = [json.loads(line)["loss/mean"]
              for line in (tmp_path / "runs/two/eval.jsonl").read_text().splitlines()]
    assert losses[-2] == pytest.approx(losses[-1], abs=1e-6) and len(losses) >= 2
    said = command(tmp_path, *words, "data.vocab_size=200", "run.name=bad", code=12)
    assert said.count("E-DATA-073") == 1, said

"""Data that changes under training: every rank leaves with the code of data, whoever reads it."""

import os
from pathlib import Path

import pytest

from moetrain.config.compose import compose
from moetrain.data.prepare import prepare
from moetrain.errors import DataError
from moetrain.train.evaluate import evaluate
from moetrain.train.setup import join, set_up
from moetrain.train.step import train_step
from tests.integration.training import TINY


def damage_one(folders: list[str], victim: int, split: str) -> int:
    """Exit code of this rank when the shard that rank `victim` reads is cut short. Every rank has a copy of its own."""
    rank = int(os.environ["RANK"])
    config = compose([*(word for word in TINY if not word.startswith("data")), "data=tokens", f"data.path={folders[rank]}",
                      "train.micro_batch=8", "parallel=ddp", "eval.windows=2", "eval.batch=1"])
    run = set_up(config, Path("unused"), join(config))
    train_step(run, 1)
    evaluate(run.state.model, run.dataset, run.mesh, run.config)
    if rank == victim:
        os.truncate(Path(folders[rank]) / f"{split}-00000.tokens", 100)
    try:
        train_step(run, 2)
        evaluate(run.state.model, run.dataset, run.mesh, run.config)
    except DataError as error:
        assert error.id == "E-DATA-006" and rank == victim
        return error.code
    except SystemExit as leaving:
        assert rank != victim
        return leaving.code
    return 0


@pytest.mark.ranks
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_data_that_one_rank_cannot_read_ends_all_with_its_code(ranks, tmp_path: Path, split: str) -> None:
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} words and more " * 100)
    folders = [str(prepare(path=str(tmp_path / "text"), out=tmp_path / f"data-{rank}", tokenizer="bytes", domain_cap=None))
               for rank in range(2)]
    assert ranks(2).run(damage_one, folders, 1, split) == [12, 12]

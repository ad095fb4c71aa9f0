"""Data that changes under training: every rank leaves with the code of data, whoever reads it."""

import os
from pathlib import Path

import pytest
import torch

from moetrain.config.compose import compose
from moetrain.data.preparation.prepare import prepare
from moetrain.errors import DataError
from moetrain.parallel.state_shards import state_shards
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.step import train_step
from tests.support.training import TINY

STEP = {
    "ddp": ["parallel=ddp"],
    "ep": ["parallel=ep", "train.micro_batch=4", "data.mask_documents=true"],
}
MORE_STEPS = {
    "fsdp": ["parallel=fsdp", "capacity=prob"],
    "fssdp": ["parallel=fssdp", "balance=sequence"],
    "fssdp, calibrated": ["parallel=fssdp", "parallel.calibrate=true", "train.activation_checkpointing=full"],
    "ep, count pass": ["parallel=ep", "train.micro_batch=2", "train.count_pass=true",
                       "train.activation_checkpointing=selective"],
    "ep, chunks, attached": ["parallel=ep", "schedule=fixed", "schedule.chunks=2", "train.aux_loss=injected",
                             "router=sigmoid"],
    "ep, warm": ["parallel=ep", "train.micro_batch=4", "balance.mode=warm", "train.head_chunk=16"],
}


def damage_one(folders: list[str], victim: int, split: str, overrides: list[str]) -> tuple[int, bool]:
    """Cut short the shard that rank `victim` reads, then train and evaluate.

    Every rank has its own copy of the data.

    Returns:
        The exit code of this rank, and whether the model is then as before.
    """
    rank = int(os.environ.get("RANK", 0))
    config = compose([*(word for word in TINY if not word.startswith("data")), "data=tokens",
                      f"data.path={folders[rank]}",
                      "train.micro_batch=8", *overrides, "eval.windows=2", "eval.batch=1"])
    run = set_up(config, Path("unused"), join(config))
    train_step(run, 1)
    evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    if rank == victim:
        os.truncate(Path(folders[rank]) / f"{split}-00000.tokens", 100)
    before, code = [shard.rows.clone() for shard in state_shards(run.state.model)], 0
    try:
        train_step(run, 2)
        evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    except DataError as error:
        assert error.id == "E-DATA-006" and rank == victim
        code = error.code
    except SystemExit as leaving:
        assert rank != victim
        code = leaving.code
    return code, all(torch.equal(rows, shard.rows)
                     for rows, shard in zip(before, state_shards(run.state.model)))


@pytest.mark.ranks
@pytest.mark.parametrize("split, step", [("heldout", "ddp"), *(("train", step) for step in STEP),
                                         *(pytest.param("train", step, marks=pytest.mark.full)
                                           for step in MORE_STEPS)])
def test_data_that_one_rank_cannot_read_ends_all_with_its_code(
        ranks, tmp_path: Path, split: str, step: str) -> None:
    """The step runs to its end on every rank, and none applies it."""
    found = ranks(2).run(damage_one, prepared_for(2, tmp_path), 1, split, {**STEP, **MORE_STEPS}[step])
    assert found == [(12, split == "train")] * 2


def test_data_that_a_run_without_ranks_cannot_read_ends_it(tmp_path: Path) -> None:
    assert damage_one(prepared_for(1, tmp_path), 0, "train", ["train.micro_batch=16"]) == (12, True)


def prepared_for(ranks: int, folder: Path) -> list[str]:
    """Token shards, a copy for each rank."""
    (folder / "text").mkdir()
    for number in range(4):
        (folder / "text" / f"{number}.txt").write_text(f"{number} words and more " * 100)
    return [str(prepare(path=str(folder / "text"), out=folder / f"data-{rank}", tokenizer="bytes",
                        domain_cap=None))
            for rank in range(ranks)]

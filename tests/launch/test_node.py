"""Which of how many nodes this is, and the config for all of them."""

import os

import pytest

from moetrain.errors import ConfigErrors
from moetrain.launch.node import Node, config_for, from_environment

TWO = {"NODES": "2", "NODE_RANK": "1", "HEAD": "a", "NPROC": "4"}


def test_one_node_needs_nothing() -> None:
    node = from_environment({"CUDA_VISIBLE_DEVICES": ""})
    assert ((node.nodes, node.rank, node.nproc, node.ranks, node.restarts, node.timeout_s)
            == (1, 0, 1, 1, 3, 60))


def test_settings_are_taken() -> None:
    node = from_environment({**TWO, "PORT": "29500", "RESTARTS": "0", "RDZV_TIMEOUT": "5"})
    assert (node == Node(nodes=2, rank=1, head="a", port=29500, nproc=4, restarts=0, timeout_s=5)
            and node.ranks == 8)


def test_a_slurm_task_knows_its_number() -> None:
    of_step = {"NODES": "3", "HEAD": "a", "NPROC": "1", "SLURM_NODEID": "2"}
    assert from_environment(of_step).rank == 2
    assert from_environment({**of_step, "NODE_RANK": "1"}).rank == 1
    # A run of its own in a shell of Slurm
    assert from_environment({**of_step, "NODES": "1"}).rank == 0


@pytest.mark.parametrize("environ, ranks", [
    ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, 8), ({"CUDA_VISIBLE_DEVICES": "3,5"}, 2),
    ({"CUDA_VISIBLE_DEVICES": "3,5", "NPROC": "1"}, 1)])
def test_a_rank_for_each_gpu(environ: dict[str, str], ranks: int) -> None:
    assert from_environment(environ).nproc == ranks


@pytest.mark.parametrize("change, advice", [
    ({"NODES": "x"}, "NODES=1"), ({"NODES": "0"}, "NODES=1"), ({"NODE_RANK": "2"}, "NODE_RANK=1 or NODES=3"),
    ({"HEAD": ""}, "HEAD=<name"), ({"NPROC": "-1"}, "NPROC=1"), ({"PORT": "65536"}, "PORT=29400"),
    ({"RDZV_TIMEOUT": "0"}, "RDZV_TIMEOUT=60"),
    ({"RESTARTS": "many"}, "RESTARTS=3")])
def test_wrong_settings_say_what_to_set(change: dict[str, str], advice: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        from_environment({**TWO, **change})
    assert advice in str(caught.value) and {error.id for error in caught.value.errors} == {"E-CONFIG-046"}


def test_all_that_is_wrong_is_said_together() -> None:
    with pytest.raises(ConfigErrors) as caught:
        from_environment({"NODES": "2", "NPROC": "0"})
    assert [error.where.split()[0] for error in caught.value.errors] == ["NPROC", "NODE_RANK", "HEAD"]


def test_the_config_is_checked_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.delenv("RANK", raising=False)
    assert config_for(["experiment=debug", "parallel=ep"], 8).parallel.mode == "ep"
    with pytest.raises(ConfigErrors, match="16 ranks"):
        config_for(["experiment=debug", "parallel=ep"], 16)
    assert os.environ["WORLD_SIZE"] == "7" and "RANK" not in os.environ

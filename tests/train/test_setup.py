"""Which device a rank takes, and over what ranks talk."""

import pytest
import torch

from moetrain.comm import mesh
from moetrain.config.compose import compose
from moetrain.errors import ConfigError
from moetrain.train import setup
from moetrain.train.setup import pick_device
from tests.ranks import free_port


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def rank(number: int, of: int) -> None:
        monkeypatch.setenv("LOCAL_RANK", str(number))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of))

    return rank


def test_every_rank_has_a_gpu_of_its_own(two_gpus):
    two_gpus(1, of=2)
    assert pick_device(compose([])) == torch.device("cuda", 1)
    assert pick_device(compose(["run.device=cpu"])) == torch.device("cpu")


def test_a_rank_without_a_gpu_says_so(two_gpus):
    two_gpus(2, of=3)
    with pytest.raises(ConfigError, match="no GPU for rank 2 of this machine") as error:
        pick_device(compose([]))
    assert "torch sees 2" in str(error.value) and "run.nproc=2" in str(error.value) and "run.share_gpu=true" in str(error.value)
    two_gpus(0, of=4)                                    # a launcher that shows each rank its own GPU as the first
    assert pick_device(compose([])) == torch.device("cuda", 0)


def test_gpus_can_be_shared_in_turn(two_gpus):
    found = []
    for number in range(4):
        two_gpus(number, of=4)
        found.append(pick_device(compose(["run.share_gpu=true"])).index)
    assert found == [0, 1, 0, 1]


@pytest.mark.parametrize("shared", [False, True])
def test_sharing_is_told_to_the_process_group_and_to_torch(shared, two_gpus, monkeypatch):
    two_gpus(1, of=4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    told = []
    monkeypatch.setattr(setup, "connect", lambda device, timeout_s, *, over_host: told.append((
        over_host, setup.os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"))))
    setup.join(compose(["parallel=ddp", "run.nproc=1", f"run.share_gpu={shared}"]))
    assert told == [(shared, "1" if shared else None)]


@pytest.mark.parametrize("device, host, wanted", [("cuda", False, "nccl"), ("cuda", True, "gloo"), ("cpu", False, "gloo")])
def test_ranks_that_share_a_gpu_talk_over_the_host(device, host, wanted, monkeypatch):
    asked = []
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mesh.dist, "init_process_group", lambda backend, device_id, **_: asked.append((backend, device_id)))
    mesh.connect(torch.device(device), 5, over_host=host)
    assert asked == [(wanted, torch.device(device) if wanted == "nccl" else None)]          # NCCL connects at once

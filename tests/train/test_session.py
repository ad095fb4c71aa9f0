"""A process joins the ranks of a run: over which backend they talk, and what a shared GPU changes."""

import pytest
import torch

from moetrain.comm import mesh
from moetrain.config.compose import compose
from moetrain.train import session
from tests.support.ranks import free_port


@pytest.mark.parametrize("shared", [False, True])
def test_sharing_is_told_to_the_process_group_and_to_torch(shared, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    # So that what `join` sets is gone after the test
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "")
    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES")
    monkeypatch.setattr(session, "pick_device", lambda config: torch.device("cuda", 1))
    monkeypatch.setattr(session, "take_device", lambda device: None)
    told = []
    monkeypatch.setattr(session, "connect", lambda device, timeout_s, *, over_host: told.append((
        over_host, session.os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"))))
    session.join(compose(["parallel=ddp", "run.nproc=1", f"run.share_gpu={shared}"]))
    assert told == [(shared, "1" if shared else None)]


@pytest.mark.parametrize("device, host, wanted",
                         [("cuda", False, "nccl"), ("cuda", True, "gloo"), ("cpu", False, "gloo")])
def test_ranks_that_share_a_gpu_talk_over_the_host(device, host, wanted, monkeypatch):
    asked = []
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mesh.dist, "init_process_group",
                        lambda backend, device_id, **_: asked.append((backend, device_id)))
    mesh.connect(torch.device(device), 5, over_host=host)
    # NCCL connects at once
    assert asked == [(wanted, torch.device(device) if wanted == "nccl" else None)]

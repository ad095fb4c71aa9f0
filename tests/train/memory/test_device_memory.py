"""Ranks of a machine have equal parts of its memory."""

import pytest
import torch

from moetrain.comm.mesh import Group, build_mesh, mesh_sizes
from moetrain.train.memory import device_memory


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_of_a_machine_share_what_it_has_and_what_is_left(monkeypatch: pytest.MonkeyPatch,
                                                               ranks: int) -> None:
    mesh = build_mesh(mesh_sizes("single", 1, None), torch.device("cpu"))
    mesh.groups["node"] = Group("node", tuple(range(ranks)), 0)
    for name, found in {"machine_memory": 1000, "job_memory": [800, 900], "total_memory": 1200}.items():
        monkeypatch.setattr(device_memory, name, lambda found=found: found)
    assert device_memory.free_memory(mesh, share_gpu=False) == 800 // ranks
    assert device_memory.available_memory(mesh, share_gpu=True) == (1200 // ranks, None)

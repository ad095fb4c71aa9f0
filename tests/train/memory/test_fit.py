"""A run that does not fit is refused before anything is allocated."""

import pytest
import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.compose import compose
from moetrain.config.size_check import Available
from moetrain.errors import ConfigError
from moetrain.train.memory import fit


def test_a_gpu_that_others_fill_is_refused_before_a_model_is_built(monkeypatch):
    mesh = Mesh({}, 0, torch.device("cuda", 0), {})
    monkeypatch.setattr(fit, "available_memory", lambda mesh, share_gpu: Available(2**40, 2**36))
    free = iter([2**36, 2**16])
    monkeypatch.setattr(fit, "free_memory", lambda mesh, share_gpu: next(free))
    fit.refuse_what_cannot_fit(compose(["experiment=debug"]), mesh)
    with pytest.raises(ConfigError, match="E-CONFIG-111 .* free"):
        fit.refuse_what_cannot_fit(compose(["experiment=debug"]), mesh)

"""Training on simulated devices with the kernels of csrc, emulated on the host: the references' numbers."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from moetrain.ops import extension
from moetrain.train.recorder import environment
from tests.ops.kernels_on_host import bindings
from tests.support.ranks import Ranks
from tests.support.simulated_device.operators import fallback
from tests.support.training import Trained, alone, assert_trains_alike, make_run, train_run, union

pytestmark = [pytest.mark.ranks, pytest.mark.full]

STEPS, CUDA = 2, "13.0"
CALLS: Counter[str] = Counter()
HOST_WAITS = "moetrain::await_signals_"              # the emulated kernel looks once, and does not wait


@pytest.fixture(scope="module")
def kernels(devices):
    """Processes of their own: a library is loaded for good."""
    devices(1)                                       # skips where there can be none
    with Ranks(2, simulated=True) as pool:
        pool.run(use_kernels, str(bindings()))
        yield pool


def use_kernels(library: str) -> None:
    """Load the library as that of a GPU is loaded, and let its kernels compute what lies on a device."""
    major, minor = torch.cuda.get_device_capability()
    extension.write_label(Path(library), [f"{major}{minor}"], CUDA, sources=Path("none"))
    with mock.patch.dict(os.environ, {extension.SWITCH: "1"}), mock.patch.object(torch.version, "cuda", CUDA):
        extension._REASON = extension.load(Path(library), sources=Path("none"))
    assert extension.absent() is None
    registered = torch.library.Library("moetrain", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_all_op_names():
        ours = name.startswith("moetrain::") and name != HOST_WAITS
        if ours and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            op = getattr(torch.ops.moetrain, name.removeprefix("moetrain::")).default
            registered.impl(op, partial(_counted, op))
    extension.REGISTERED = registered                # kept for as long as the process lives


def _counted(op, *args, **kwargs):
    CALLS[op._schema.name.removeprefix("moetrain::")] += 1
    return fallback(op, *args, **kwargs)


def with_kernels(overrides: list[str]) -> tuple[Trained, object, set[str]]:
    CALLS.clear()
    run = make_run([*overrides, "run.device=cuda"])
    trained = train_run(run, STEPS)
    return trained, environment(run)["kernels"], set(CALLS)


MESHES = {"ddp": ["parallel=ddp"], "ep": ["parallel=ep", "parallel.exchange=peer_push"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_kernels_train_as_the_references_do(mesh: str, dtype: str, kernels) -> None:
    results = kernels.run(with_kernels, [*MESHES[mesh], "run.nproc=2", "train.micro_batch=8",
                                         f"run.dtype={dtype}"])
    ours = union([trained for trained, _, _ in results])
    theirs = alone([f"run.dtype={dtype}"], STEPS)
    for _, in_use, called in results:
        assert in_use == "in use" and {"permute", "unpermute", "swiglu"} <= called, called
        assert ("push_rows_" in called) == (mesh == "ep")
        assert ("route_plan" in called) == (mesh == "ep" or dtype == "bfloat16")
    if dtype == "float32":
        return assert_trains_alike(ours, theirs)
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        for name in ("loss/ce", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=2e-2), name

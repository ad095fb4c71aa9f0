"""An allocation that fails in training is told with what takes most, and what to change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.config.compose import compose
from moetrain.errors import OutOfMemoryError
from moetrain.train.memory.out_of_memory import describe, is_out_of_memory, largest_items, out_of_memory_named
from tests.support.training import make_run

ROOT = Path(__file__).parents[3]
# Room for the process as it is when training begins, and a little more.
SCRIPT = """
import resource, sys
import moetrain.train.loop as loop
from moetrain.__main__ import main

original = loop.train_step
def limited(*arguments):
    resident = next(int(line.split()[1]) * 1024
                    for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (resident + 150 * 2**20, resource.RLIM_INFINITY))
    return original(*arguments)
loop.train_step = limited
sys.exit(main(sys.argv[1:]))
"""
BIG = ["experiment=debug", "train.global_batch=8", "train.seq_len=512", "data.vocab_size=32768",
       "eval.windows=1"]


def test_a_real_allocation_that_fails_ends_with_18_and_says_what_to_change(tmp_path: Path) -> None:
    words = [*BIG, f"run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, "train", *words], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 18, done.stdout + done.stderr
    code, where, why, advice = (line for line in done.stderr.splitlines() if line)
    assert code.startswith("E-MEMORY-001  out of memory on cpu in step 1: an allocation of ")
    assert "rank 0 of 1" in where
    assert "items of a rank: logits of 1 micro-batch about 1.07 GB, activations" in why
    assert "parameters" in why
    assert "with train.head_chunk=1024 or train.micro_batch=4;" in advice
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "status.json").read_text())["code"] == 18
    for option in advice.partition("with ")[2].partition(";")[0].split(" or "):
        compose([*words, option])                            # what it says to type is accepted


def test_the_kinds_of_failed_allocations_are_known_and_nothing_else_is() -> None:
    allocator = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: "
                             "can't allocate memory: you tried to allocate 512000000 bytes.")
    for error in (allocator,
                  torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
                  MemoryError(),
                  RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")):
        assert is_out_of_memory(error)
    run = make_run([])
    assert "an allocation of 512 MB failed" in describe(run, allocator).what
    assert "an allocation of 20.00 GiB failed" in describe(
        run, torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")).what
    with pytest.raises(OutOfMemoryError), out_of_memory_named(run):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named(run):
        raise RuntimeError("shapes do not fit")


def test_the_largest_items_come_first_and_are_measured() -> None:
    run = make_run(["run.dtype=float32"])
    items = dict(largest_items(run))
    weights = sum(parameter.nbytes for parameter in run.state.model.parameters())
    assert items["parameters"] == items["gradients"] == weights
    assert 2 * weights <= items["optimizer state"] < 2 * weights + 4096
    assert list(items.values()) == sorted(items.values(), reverse=True)
    run.graphs = run.graphs._replace(kept=False, graph=10**9)    # as measured, where it was
    (name, size), *_ = largest_items(run)
    assert name == "activations of 1 micro-batch about"
    assert size + dict(items)["logits of 1 micro-batch about"] == 10**9


@pytest.mark.parametrize("overrides, advice", [
    (["train.micro_batch=4", "model.dim=64"],
     "train.micro_batch=2 or train.activation_checkpointing=full or train.count_pass=true"),
    (["train.micro_batch=4", "data.vocab_size=4096"],
     "train.head_chunk=1024 or train.micro_batch=2 or train.count_pass=true"),
    (["train.micro_batch=1", "train.activation_checkpointing=full", "train.head_chunk=8"],
     "train.count_pass=true"),
])
def test_what_to_change_is_what_is_not_changed_yet(overrides: list[str], advice: str) -> None:
    run = make_run(["train.seq_len=128", *overrides])
    assert (describe(run, MemoryError()).next
            == f"the same command with {advice}; it goes on from the newest save")

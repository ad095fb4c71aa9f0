"""The benchmark of the ops, its logic: what is checked before it is timed, and what is not measured twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.bench import ops as bench_ops
from tools.bench.op_cases import CASES, SMALL, case_of

CHIP = {"C": 1e9, "R": 1e9}


def run(out: Path, *arguments: str) -> None:
    words = ["--out", str(out), "--device", "cpu", "--small", "--repeats", "1", "--shapes", "mixtral"]
    assert bench_ops.main([*words, *arguments]) == 0


def test_cells_are_written_once_and_say_that_a_cpu_means_nothing(tmp_path, capsys):
    out = tmp_path / "ops.json"
    run(out, "--only", "permute,wgrad")
    assert bench_ops.MEANINGLESS in capsys.readouterr().out
    first = json.loads(out.read_text())
    assert {key.split()[0] for key in first["cells"]} == {"permute", "wgrad"}
    assert first["processes"][0]["meaningless"]
    np.savez(tmp_path / "loads.npz", loads=np.arange(16).reshape(2, 1, 8))
    run(out, "--only", "permute,wgrad,route_plan", "--loads", str(tmp_path / "loads.npz"))
    run(out, "--only", "permute")                        # nothing left to measure
    last = json.loads(out.read_text())
    assert all(last["cells"][key] == cell for key, cell in first["cells"].items())
    assert len(last["processes"]) == 2
    assert sum("recorded" in key for key in last["cells"]) == 3 == len(last["cells"]) - len(first["cells"])


@pytest.mark.parametrize("op", CASES)
def test_every_candidate_is_right_in_every_op(op):
    case = case_of(op, SMALL["olmoe"], 24, lambda experts: torch.arange(1.0, experts + 1), "cpu")
    for name, candidate in case.candidates.items():
        result = bench_ops.attempt(case, candidate, CHIP, "cpu", 1)
        assert result.get("error", 0) <= case.tolerance and "wrong" not in result, (name, result)
        assert "absent" in result or result["seconds"] > 0


@pytest.mark.parametrize("broken", [lambda x: x * 1.01, lambda x: x * torch.nan, lambda x: x[:-1]])
def test_what_is_wrong_is_not_timed(broken):
    case = case_of("swiglu", SMALL["olmoe"], 24, lambda experts: torch.ones(experts), "cpu")
    plain = case.candidates["plain torch"]
    result = bench_ops.attempt(case, lambda *inputs: (broken(plain(*inputs)[0]),), CHIP, "cpu", 1)
    assert "wrong" in result and "seconds" not in result

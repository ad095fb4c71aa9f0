"""The benchmark of routers, its logic: what is compared with what, and what is left out."""

import csv
from pathlib import Path

import pytest

from tools.bench import routers as bench_routers

SMALL = ["--experts", "6", "--top-k", "3", "--dim", "8", "--tokens", "12", "--repeats", "1"]


def test_every_router_is_compared_with_topk_of_as_many_experts(tmp_path: Path, capsys):
    out = tmp_path / "times.csv"
    assert bench_routers.main([*SMALL, "--only", "sparsemixer,cosine", "--out", str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        rows = {row["router"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["topk model.top_k=2", "sparsemixer model.top_k=2", "topk", "cosine"]
    for name in ("topk", "topk model.top_k=2"):
        assert float(rows[name]["forward_ratio"]) == float(rows[name]["both_ratio"]) == 1
    assert all(float(number) > 0 for row in rows.values() for name, number in row.items() if name != "router")
    assert "sparsemixer model.top_k=2" in capsys.readouterr().out


def test_a_router_that_the_sizes_do_not_fit_is_left_out(capsys):
    found = bench_routers.subjects(["sigmoid"], ["model.num_experts=2", "model.top_k=3"])
    assert found == []
    assert "sigmoid: left out" in capsys.readouterr().err


@pytest.mark.parametrize("option", bench_routers.VARIANTS)
def test_variants_are_named_and_none_is_measured_twice(option):
    names = [subject.name for subject in bench_routers.subjects([option], ["model.top_k=2", "model.dim=8"])]
    assert len(set(names)) == len(names) and "topk" in names
    assert sum(name.split()[0] == option for name in names) == 1 + len(bench_routers.VARIANTS[option])

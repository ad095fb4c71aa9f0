"""The programs of examples/ run, and every domain uses the experts of its list and no others."""

import importlib

import pytest

EXPERTS = {
    "domain": {"code": {0, 1, 2, 3}, "prose": {0, 1, 4, 5}},
    "task": {"count": {0, 1, 2}, "reverse": {0, 3, 4}},
    "modality": {"image": {0, 1, 2, 3}, "text": {4, 5, 6, 7}},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_an_example_runs(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(f"examples.{name}.train").main(tmp_path / "out")
    used = {domain: {expert for expert, count in enumerate(counts) if count}
            for domain, counts in found.items()}
    assert used.keys() == EXPERTS[name].keys()
    assert all(used[domain] <= EXPERTS[name][domain] and len(used[domain]) >= 2 for domain in used)

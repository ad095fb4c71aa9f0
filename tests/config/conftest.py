"""Hydra composes each set of choices once: these tests compose hundreds of times, mostly the same yaml."""

import copy

import pytest

from moetrain.config import compose

_COMPOSED: dict[str, tuple] = {}
_COMPOSE_YAML = compose._compose_yaml


@pytest.fixture(autouse=True)
def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(choices: dict) -> tuple:
        key = f"{compose.config_dir()} {choices}"
        if key not in _COMPOSED:
            _COMPOSED[key] = _COMPOSE_YAML(choices)
        return copy.deepcopy(_COMPOSED[key])

    monkeypatch.setattr(compose, "_compose_yaml", cached)

"""A run is complete only with a sound last checkpoint and its evaluation."""

from dataclasses import replace

import pytest

from moetrain.config.compose import compose, to_yaml
from moetrain.runs.completion import finished_step
from tests.support.checkpoints import SMALL, flip, payload, saved, trained


@pytest.mark.parametrize("verify, done", [("full", None), ("sizes", 2)])
def test_a_flipped_bit_in_the_last_checkpoint_leaves_something_to_do(tmp_path, verify, done):
    config = compose(["data=synthetic", *SMALL, "run.steps=2", f"checkpoint.verify={verify}"])
    directory = saved(trained(2, SMALL), tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert finished_step(config, tmp_path) is None            # its evaluation is owed
    (tmp_path / "eval.jsonl").write_text('{"step": 2}\n')
    assert finished_step(config, tmp_path) == 2
    assert finished_step(replace(config, run=replace(config.run, steps=3)), tmp_path) is None
    file = payload(directory)
    flip(file, file.stat().st_size - 9)
    assert finished_step(config, tmp_path) == done

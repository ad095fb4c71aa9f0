"""The frame of transforms: what is recorded, what is compared, and that a failure leaves nothing behind."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from moetrain.__main__ import main
from moetrain.errors import CheckpointError, ConfigError
from moetrain.transform import Rule, WeightsReader, open_weights, transform

EXPERTS = 8


def permuted(source: WeightsReader) -> Iterator[tuple[str, Tensor]]:
    """Expert e becomes expert 7 - e, and so do its row and its bias of the router."""
    for name, tensor in source:
        flipped = re.sub(r"(?<=\.experts\.)\d+", lambda found: str(EXPERTS - 1 - int(found[0])), name)
        yield flipped, tensor.flip(0) if ".router." in name else tensor


def routers_left_alone(source: WeightsReader) -> Iterator[tuple[str, Tensor]]:
    """The same without the rows: each router chooses other experts than those it knows."""
    originals = {name: tensor for name, tensor in source if ".router." in name}
    return ((name, originals.get(name, tensor)) for name, tensor in permuted(source))


def written(name: str, change, expected, **arguments):
    with open_weights("mine") as source:
        config = replace(source.config, run=replace(source.config.run, name=name, dir=None))
        rule = Rule("permute", {"experts": "reversed"}, expected, seed=7)
        return transform(f"runs/{name}", rule, [source], config, change(source), **arguments)


def test_a_transform_is_recorded_and_its_logits_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    done = written("reversed", permuted, "exact", verify=True,
                   files=lambda unfinished: (unfinished / "notes").write_text("kept"))
    assert done.checkpoint.parents[1] == Path("runs/reversed").absolute()
    record = json.loads(Path("runs/reversed/transform.json").read_text())
    assert record == json.loads(json.dumps(done.record))
    with open_weights("mine") as source, open_weights("reversed") as found:
        assert record["sources"] == [{"path": str(source.directory.absolute()), "digest": source.digest}]
        assert found.manifest.facts["transform"] == record["rule"]
        assert record["rule"] == {"name": "permute", "experts": "reversed"}
    assert (record["seed"], record["expected"], record["config"]) == (7, "exact", {})
    assert record["verified"]["tokens"] == [2, 16] and record["verified"]["max_abs_delta"] < 1e-5
    assert re.fullmatch(r"max \|delta logit\| \S+ \(largest logit \S+\), expected: exact", done.verdict)
    assert (Path("runs/reversed") / "notes").read_text() == "kept"
    assert main(["checkpoint", "verify", "reversed"]) == 0 and capsys.readouterr().out


def test_keys_of_the_config_that_differ_are_recorded() -> None:
    with open_weights("mine") as source:
        config = replace(source.config, train=replace(source.config.train, micro_batch=3))
        done = transform("runs/keys", Rule("copy", {}, "exact"), [source], config, iter(source))
        before = source.config.train.micro_batch
    assert done.record["config"] == {"train.micro_batch": [before, 3]} and done.difference is None


def test_an_exact_rule_that_is_not_leaves_nothing() -> None:
    before = sorted(Path("runs").iterdir())
    with pytest.raises(CheckpointError) as caught:
        written("wrong", routers_left_alone, "exact", verify=True)
    assert caught.value.id == "E-CHECKPOINT-045" and "max |delta logit|" in caught.value.why
    assert sorted(Path("runs").iterdir()) == before
    done = written("apart", routers_left_alone, "not preserving", verify=True)
    assert done.difference is not None and done.difference.max_abs_delta > 1e-3


def test_failures_and_existing_places_leave_everything_as_it_was() -> None:
    def breaks_off(source: WeightsReader) -> Iterator[tuple[str, Tensor]]:
        yield from list(source)[:3]
        raise RuntimeError("the rule is wrong")

    before = sorted(Path("runs").iterdir())
    with pytest.raises(RuntimeError, match="the rule is wrong"):
        written("broken", breaks_off, "exact")
    with pytest.raises(ConfigError) as caught:
        written("mine", permuted, "exact")
    assert caught.value.id == "E-CONFIG-322" and sorted(Path("runs").iterdir()) == before

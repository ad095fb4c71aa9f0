"""A transform reads a run tensor by tensor and writes another: what the commands then say of it.

Three transforms that only tests have: an identity copy, one that doubles a tensor, one that permutes the
experts of every layer. They stand for those that make large models of small ones.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.__main__ import main
from moetrain.checkpoint import disk
from moetrain.checkpoint.manifest import read_manifest
from moetrain.checkpoint.verify import problems
from moetrain.errors import ConfigError
from moetrain.transform import WeightsReader, open_weights, write_run, writer
from tests.support.trained_run import losses, records, train

EXPERTS = 8
_EXPERT = re.compile(r"(.+\.experts\.)(\d+)(\..+)")


def doubled(source: WeightsReader) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source:
        yield name, 2 * tensor if name == "model.head" else tensor


def permuted(source: WeightsReader) -> Iterator[tuple[str, Tensor]]:
    """Expert e becomes expert 7 - e, with its rows of the router and of the selection biases."""
    for name, tensor in source:
        if found := _EXPERT.fullmatch(name):
            name = f"{found[1]}{EXPERTS - 1 - int(found[2])}{found[3]}"
        elif ".router." in name:
            tensor = tensor.flip(0)
        yield name, tensor


def written(name: str, transform=iter) -> Path:
    with open_weights("mine") as source:
        return write_run(Path("runs") / name, source.config, transform(source), source=source)


def evaluated(name: str) -> dict[str, float]:
    assert main(["eval", name]) == 0
    return losses(records(Path("runs") / name)[-1])


def test_an_identity_copy_is_the_source_to_the_bit(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = written("copy")
    assert checkpoint == Path("runs/copy/checkpoints/step-00000000").absolute()
    with open_weights("mine") as source, open_weights("copy") as copy:
        assert copy.names == source.names and copy.digest == source.digest
        assert all(torch.equal(copy[name], source[name]) for name in source.names)
        assert copy.manifest.facts["source"]["digest"] == source.digest
    assert list(problems(checkpoint)) == []
    assert not any(name.startswith("optim.") for name in read_manifest(checkpoint).names())
    assert evaluated("copy") == losses(records(Path("runs/mine"))[-1])
    capsys.readouterr()
    for words, says in ((["checkpoint", "verify", "copy"], "step-00000000"), (["inspect", "copy"], "model"),
                        (["generate", "copy", "generate.tokens=3"], "")):
        assert main(words) == 0 and says in capsys.readouterr().out
    assert not (Path("runs/copy") / "data").exists(), "the source's data is read where it lies"


def test_changed_weights_are_what_the_commands_see() -> None:
    written("doubled", doubled)
    written("permuted", permuted)
    truth = losses(records(Path("runs/mine"))[-1])
    twice, other = evaluated("doubled"), evaluated("permuted")
    assert all(twice[name] != value for name, value in truth.items())
    assert all(other[name] == pytest.approx(value, rel=1e-5) for name, value in truth.items())
    with open_weights("mine") as source, open_weights("permuted") as found:
        assert found.digest != source.digest
        name = "model.layers.2.moe.experts.{}.down"
        assert torch.equal(found[name.format(1)], source[name.format(6)])


def test_a_run_begins_from_a_transform(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written("seed")
    train(place, "router=sigmoid", "model.num_layers=3", "model.moe_layers=[0,2]", "run.name=next",
          "init.from=seed", "run.steps=1")
    capsys.readouterr()
    assert main(["train", "seed"]) == 13                 # there is no optimizer to go on with
    said = capsys.readouterr().err
    assert "E-CHECKPOINT-009" in said and "init.from=" in said


def test_float64_is_kept_and_float32_becomes_it(place: Path) -> None:
    with open_weights("mine") as source:
        config = replace(source.config, run=replace(source.config.run, dtype="float64"))
        write_run("runs/wide", config, iter(source), source=source)
    with open_weights("wide") as found, open_weights("mine") as source:
        assert {tensor.dtype for _, tensor in found} == {torch.float64}
        assert all(torch.equal(found[name].float(), source[name]) for name in source.names)
    first = evaluated("wide")
    shutil.copytree("runs/mine", "runs/narrow")           # float32 weights, read by a float64 run
    text = Path("runs/narrow/config.yaml").read_text().replace("dtype: float32", "dtype: float64")
    Path("runs/narrow/config.yaml").write_text(text)
    assert evaluated("narrow") == first


@pytest.mark.parametrize("change, says", [
    (lambda pairs: pairs[1:], "model.embed: expected F32 [257, 32], found none"),
    (lambda pairs: [*pairs, ("model.other", torch.zeros(2))], "expected no such tensor, found F32 [2]"),
    (lambda pairs: [(name, tensor[:5]) for name, tensor in pairs[:1]] + pairs[1:], "found F32 [5, 32]"),
    (lambda pairs: [*pairs, pairs[0]], "model.embed: came twice"),
])
def test_wrong_tensors_are_named_and_nothing_is_left(change, says: str) -> None:
    with open_weights("mine") as source:
        pairs = change(list(source))
        with pytest.raises(ConfigError) as caught:
            write_run("runs/wrong", source.config, iter(pairs), source=source)
    assert caught.value.id == "E-CONFIG-223" and says in caught.value.why
    assert not [path for path in Path("runs/wrong").rglob("*") if path.is_file()]


def test_a_directory_with_a_run_is_refused() -> None:
    with open_weights("mine") as source, pytest.raises(ConfigError) as caught:
        write_run("runs/mine", source.config, iter(source), source=source)
    assert caught.value.id == "E-CONFIG-226"


def test_no_more_than_a_buffer_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers become several files; a tensor larger than a buffer is a file of its own."""
    monkeypatch.setattr(writer, "_MOST", 20_000)
    created: list[str] = []
    with disk.observed(lambda when, what, path, count: created.append(path.name)
                       if (when, what) == ("after", "create") else None):
        checkpoint = written("pieces")
    files = [name for name in created if name.endswith(".safetensors")]
    assert len(files) > 5 and list(problems(checkpoint)) == []
    held = max(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert held < 20_000 + 257 * 32 * 4 + 2_000
    with open_weights("pieces") as found, open_weights("mine") as source:
        assert found.digest == source.digest

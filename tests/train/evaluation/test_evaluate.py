"""Held-out loss: of every domain by itself, of thousands in as many passes as their windows take."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread

from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.data.batches.evaluated_domains import MOST_NAMED, OTHERS
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import write_description
from moetrain.data.preparation.split_writer import SplitWriter
from moetrain.report.specialization import draw_specialization
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.loggers.console import MOST_DOMAINS
from moetrain.train.loop import train
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.state import Run

WORDS = ["experiment=debug", "model.num_layers=2", "run.device=cpu", "train.seq_len=16",
         "train.global_batch=4", "train.micro_batch=4", "log.progress=false", "run.steps=2"]


def of_domains(folder: Path, heldout: list[int]) -> Path:
    """Tokens of so many domains, of which so much is held out."""
    names = tuple(f"host-{number}.example.org" for number in range(len(heldout)))
    counts, chance = {}, np.random.default_rng(0)
    for split, sizes in (("train", [30] * len(heldout)), ("heldout", heldout)):
        writer = SplitWriter(folder=folder, split=split, vocab_size=257, domains=names)
        for domain, size in enumerate(sizes):
            writer.add(np.append(chance.integers(97, 123, size - 1), 256), domain, size - 1)
        writer.flush()
        counts[split] = writer.counts
    write_description(folder, {"fingerprint": "abc", "tokenizer": "bytes", "vocab_size": 257,
                               "domains": list(names), "end_id": 256, "heldout_overlap": 0.0, **counts})
    return folder


def config(folder: Path, *words: str) -> Config:
    return compose([*WORDS, "data=tokens", f"data.path={folder}", f"run.dir={folder / 'run'}", *words])


def made(given: Config) -> Run:
    return set_up(given, Path(given.run.dir), join(given))


def by_hand(run: Run, part: int, windows: int) -> tuple[float, int]:
    """(nats, tokens) of a part, a window at a time."""
    nats, tokens = 0.0, 0
    for batch in run.dataset.heldout(part, windows=windows, batch=1):
        logits = run.state.model(batch.tokens_BS, evaluation_context(run, batch)).logits_BSV
        nats += float(F.cross_entropy(logits[0][batch.valid_BS[0]].double(),
                                      batch.targets_BS[0][batch.valid_BS[0]], reduction="sum"))
        tokens += int(batch.valid_BS.sum())
    return nats, tokens


def evaluation_context(run: Run, batch: object) -> object:
    from moetrain.train.micro_batches import step_context

    return step_context(run.config.run.seed, 0, batch, training=False)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_what_is_measured_does_not_depend_on_what_is_read_together(tmp_path: Path, batch: int) -> None:
    run = made(config(of_domains(tmp_path, [40, 7, 90, 16]), f"eval.batch={batch}", "eval.windows=3",
                      "run.dtype=float64"))
    found = evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    run.state.model.eval()
    for part, name in enumerate(run.dataset.measured):
        with torch.no_grad():
            nats, tokens = by_hand(run, part, 3)
        assert tokens == min([40, 7, 90, 16][part], 3 * 16)
        assert found.losses[f"loss/{name}"] == pytest.approx(nats / tokens, rel=1e-12)
        # The end-of-document token has no bytes; 3 of 5 windows do not reach it.
        ends = 1 if tokens < 48 else 0
        assert found.losses[f"nats_per_byte/{name}"] == pytest.approx(nats / (tokens - ends), rel=1e-12)
        assert found.choices_ML[part].sum() == tokens * run.config.model.top_k * len(run.state.model.routers)
    names = [f"loss/{name}" for name in run.dataset.measured]
    assert found.losses["loss/mean"] == pytest.approx(sum(found.losses[name] for name in names) / 4)


@pytest.mark.parametrize("domains", [10, 700])
def test_evaluation_takes_as_many_passes_as_its_windows_fill(tmp_path: Path, domains: int) -> None:
    run = made(config(of_domains(tmp_path, [16] * domains), "eval.batch=8", "eval.windows=20"))
    sizes: list[int] = []
    run.state.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    windows = 10 if domains == 10 else MOST_NAMED + 20
    assert sum(sizes) == windows and len(sizes) == math.ceil(windows / 8)
    assert found.choices_ML.shape[0] == (domains if domains == 10 else MOST_NAMED + 1)


def test_generated_tokens_have_no_nats_per_byte(tmp_path: Path) -> None:
    run = made(compose([*WORDS, f"run.dir={tmp_path}", "data.num_domains=40", "eval.windows=4"]))
    found = evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    assert len(found.losses) == MOST_NAMED + 2
    assert all(name.startswith("loss/") for name in found.losses)
    assert f"loss/{OTHERS}" in found.losses


def test_a_run_on_hundreds_of_domains_says_and_draws_a_bounded_amount(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = config(of_domains(tmp_path, [20] * 300), "eval.windows=2")
    train(given)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("[eval]"))
    assert len(line) < 600
    assert line.count("host-") == MOST_DOMAINS
    assert f"{MOST_NAMED + 1 - MOST_DOMAINS} more in eval.jsonl" in line
    (record,) = map(json.loads, (tmp_path / "run" / "eval.jsonl").read_text().splitlines())
    assert sum(name.startswith("loss/") for name in record) == MOST_NAMED + 2
    with np.load(tmp_path / "run" / "specialisation.npz") as file:
        assert file["choices"].shape[0] == MOST_NAMED + 1 and file["domains"][-1] == OTHERS
    assert imread(draw_specialization(tmp_path / "run")).shape[0] < 3000


def chinese(folder: Path) -> Path:
    """Text of three bytes a character, as tokens of a byte-level BPE that cuts characters and joins them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    (folder / "in").mkdir()
    for number in range(40):
        domain = "ab"[number % 2]
        (folder / "in" / domain).mkdir(exist_ok=True)
        (folder / "in" / domain / f"{number}.txt").write_text(
            f"\u7b2c{number}\u7bc7\u6587\u7ae0\uff1a" + "\u5b57\u8bcd\u53e5\u6bb5\u843d" * (number % 5 + 3))
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(["\u5b57\u8bcd\u53e5\u6587\u7ae0"] * 3, trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    library.save(str(folder / "tokenizer.json"))
    return prepare(path=str(folder / "in"), out=folder / "data", tokenizer=str(folder / "tokenizer.json"),
                   held_out_share=0.4)


def losses(words: list[str]) -> dict[str, float]:
    run = made(compose(words))
    return evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step).losses


@pytest.mark.ranks
def test_nats_per_byte_are_those_of_the_source_on_any_mesh_and_in_any_batch(ranks, tmp_path: Path) -> None:
    prepared = chinese(tmp_path)
    words = [*WORDS, "data=tokens", f"data.path={prepared}", f"run.dir={tmp_path / 'run'}",
             "run.dtype=float64", "eval.windows=1000"]
    alone = losses([*words, "eval.batch=3"])
    described = json.loads((prepared / "dataset.json").read_text())
    for domain, counts in described["heldout"].items():
        assert (alone[f"nats_per_byte/{domain}"]
                == pytest.approx(alone[f"loss/{domain}"] * counts["tokens"] / counts["bytes"], rel=1e-12))
        assert counts["bytes"] > 1.3 * counts["tokens"] > 100
    for mesh in (["parallel=ep", "parallel.ep=2"], ["parallel=fssdp"]):
        spread = [*words, "run.nproc=2", "train.micro_batch=2", "eval.batch=5", *mesh]
        for found in ranks(2).run(losses, spread):
            assert found.keys() == alone.keys()
            assert all(found[name] == pytest.approx(alone[name], rel=1e-11) for name in alone)

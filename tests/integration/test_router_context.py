"""Routers are told the same in training, its count pass, evaluation and generation.

The routers are those of tests/support/told_routers.py: they need what most routers ignore.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moetrain.__main__ import main
from moetrain.config.compose import compose, for_run
from moetrain.data.batches.batch import GENERATED_IDS, HELDOUT_IDS
from moetrain.errors import ConfigError
from moetrain.generate.sample import UNKNOWN, IncrementalModel, continue_text, text_key
from moetrain.routers.context import token_context
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.evaluation.evaluate_run import evaluate_run
from moetrain.train.evaluation.trained import load_trained, trained_tokenizer
from moetrain.train.loop import train
from moetrain.train.step import train_step
from tests.support.told_routers import (
    TOLD,
    Told,
    by_domain,
    looking_ahead,
    noisy,
    scheduled,
    told,
)
from tests.support.trained_run import corpus
from tests.support.training import make_run

# Not told to routers: callbacks of the trainer, and what layers fill in.
BESIDE = {"training", "router", "carry", "on_counts", "on_margins", "token_sums", "decisions", "edits",
          "iteration", "draw"}
RUN = ["experiment=debug", "data=text", "model.dim=16", "model.num_layers=2", "train.seq_len=12",
       "train.global_batch=4", "train.micro_batch=2", "eval.windows=2", "run.device=cpu", "run.dtype=float64",
       "run.seed=5", "run.steps=3", "balance=sequence", "log.progress=false"]


@pytest.fixture(autouse=True)
def nothing_told() -> Iterator[None]:
    TOLD.clear()
    yield
    TOLD.clear()


def fields(found: list[Told]) -> dict[str, set[str]]:
    """Known fields of contexts by the name of the router; every pass of a router knows the same ones."""
    known: dict[str, set[str]] = {}
    for context, _ in found:
        own = {name for name, value in context._asdict().items() if value is not None} - BESIDE
        assert known.setdefault(context.router, own) == own
    return known


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps whose routers read what they are told. It is evaluated at the end."""
    folder = tmp_path_factory.mktemp("told")
    corpus(folder / "corpus")
    train(compose([*RUN, f"data.path={folder}/corpus", f"run.dir={folder}/told"]), convert_model=told)
    return folder / "told"


def of_run(directory: Path, *words: str) -> list[str]:
    return [f"run.dir={directory}", "run.device=cpu", *words]


def test_evaluation_and_generation_tell_every_field_that_training_tells(trained: Path) -> None:
    run = make_run(["balance=sequence", "train.micro_batch=4", "train.count_pass=true"], None, told)
    train_step(run, 1)
    in_training = fields(TOLD)
    assert {"step", "seed", "sample_ids_T", "positions_T", "valid_T", "token_ids_T", "domains_T",
            "seq_offsets"} <= in_training["layers.0.moe"] == in_training["layers.1.moe"]
    TOLD.clear()
    evaluate(run.state.model, run.dataset, run.mesh, run.config, step=1)
    assert fields(TOLD) == in_training
    TOLD.clear()
    found = load_trained(for_run(of_run(trained)), convert_model=told)
    "".join(continued(found))
    assert fields(TOLD) == {router: own - UNKNOWN for router, own in in_training.items()}
    assert {(context.seed, context.step, context.training) for context, _ in TOLD} == {(5, 3, False)}
    assert {int(sample) for context, _ in TOLD for sample in context.sample_ids_T} == {GENERATED_IDS + 7}


def continued(found, **words) -> Iterator[str]:
    tokenizer = trained_tokenizer(found)
    wish = {"tokens": 6, "temperature": 1.0, "top_p": 0.95, "seed": 7, "cache": True, "context": 12,
            "mask_documents": False, **words}
    return iter(continue_text(found.model, tokenizer, "ab", end_id=None, run_seed=found.config.run.seed,
                              step=found.step, group=found.mesh["batch"], **wish))


def test_an_evaluation_in_training_and_one_of_its_checkpoint_are_the_same_numbers(trained: Path) -> None:
    """The last record of training was written at the step of the checkpoint, with its seed."""
    records = [json.loads(line) for line in (trained / "eval.jsonl").read_text().splitlines()]
    assert evaluate_run(for_run(of_run(trained)), convert_model=told).losses.items() <= records[-1].items()
    assert {(context.step, context.seed) for context, _ in TOLD} == {(3, 5)}
    assert all(int(context.sample_ids_T.min()) >= HELDOUT_IDS for context, _ in TOLD if context.valid_T.any())


def test_evaluation_of_a_step_routes_as_that_step_of_training() -> None:
    """A router whose number of experts grows: as many in the evaluation after step n as in step n."""
    run = make_run(["model.top_k=3", "eval.windows=4", "data.min_length=1.0"], None, scheduled)
    for step in range(1, 6):
        counts = train_step(run, step).counts["layers.0.moe"]
        run.state.step = step
        used = int(counts.sum()) / (16 * 12)
        assert used == min(3, (step + 1) // 2)
        found = evaluate(run.state.model, run.dataset, run.mesh, run.config, step=step)
        windows = 4 * len(run.dataset.measured)
        assert int(found.choices_ML.sum()) == windows * 12 * used * 2


LENGTH, CONTEXT, MARK = 14, 12, 47


def choices(found: list[Told]) -> dict[tuple[str, int], list[int]]:
    """Experts by router and position."""
    return {(context.router, int(position)): ids.tolist()
            for context, ids_TK in found for position, ids in zip(context.positions_T, ids_TK)}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("separate", [False, True])
def test_a_text_is_routed_alike_token_by_token_and_in_one_window(cache: bool, separate: bool) -> None:
    """Choices by token id, position and keyed noise, behind the end of another document, too."""
    model = make_run([f"data.mask_documents={str(separate).lower()}", "run.dtype=float64"], None,
                     told).state.model.eval()
    text_S = torch.cat([torch.tensor([MARK]), torch.arange(LENGTH) % 40])
    key = text_key(5, 3, 0)
    reader = IncrementalModel(model, CONTEXT, key=key, cache=cache, separate_first=separate)
    for length in range(3, CONTEXT + 1):
        TOLD.clear()
        ours = reader.logits(text_S[:length])
        written = choices(TOLD)
        assert not cache or len(TOLD[0].context.positions_T) == (1 if length > 3 else 3 - separate)
        TOLD.clear()
        whole = window(model, text_S[:length], key, separate)
        assert (ours - whole).abs().max() < 1e-12
        assert written.items() <= choices(TOLD).items() and written
    for length in range(CONTEXT + 1, LENGTH + 1):         # the window slides, and positions begin anew
        truth = window(model, text_S[length - CONTEXT:length], key, False)
        assert (reader.logits(text_S[:length]) - truth).abs().max() < 1e-12


def window(model, text_S, key, separate: bool) -> torch.Tensor:
    documents_BS = (torch.arange(len(text_S)) > 0).long()[None] if separate else None
    told_T = token_context(text_S[None], seed=key.seed, step=key.step, training=False,
                           sample_ids_B=torch.tensor([key.sample_id]))
    with torch.no_grad():
        return model(text_S[None], told_T, documents_BS).logits_BSV[0, -1]


def test_noise_of_a_text_is_the_same_with_and_without_the_cache_and_other_for_another_text(
        trained: Path) -> None:
    found = load_trained(for_run(of_run(trained)), convert_model=noisy)
    first, again = ("".join(continued(found, cache=cache, tokens=20)) for cache in (True, False))
    assert first == again
    logits = [IncrementalModel(found.model, CONTEXT, key=key, cache=True).logits(torch.arange(9))
              for key in (text_key(5, 3, 7), text_key(5, 3, 8), text_key(5, 4, 7), text_key(6, 3, 7))]
    assert all((logits[0] - other).abs().max() > 1e-6 for other in logits[1:])


def test_a_router_is_refused_where_what_it_reads_is_not_known(trained: Path, tmp_path: Path) -> None:
    """Domains are known of the run's own text alone."""
    assert evaluate_run(for_run(of_run(trained)), convert_model=by_domain).losses
    (tmp_path / "other.txt").write_text("some other text\n" * 40)
    words = of_run(trained, f"data.path={tmp_path}/other.txt")
    with pytest.raises(ConfigError, match="other data than the run's own has no domains_T"):
        evaluate_run(for_run(words), frozenset({"data.path"}), convert_model=by_domain)
    assert evaluate_run(for_run(words), frozenset({"data.path"}), convert_model=told).typed
    assert all(context.domains_T is None for context, _ in TOLD[-2:])
    with pytest.raises(ConfigError, match="a text that is being written has no domains_T"):
        continued(load_trained(for_run(of_run(trained)), convert_model=by_domain))


def test_a_router_that_looks_ahead_has_to_be_allowed(trained: Path) -> None:
    with pytest.raises(ConfigError, match="LookingAheadRouter looks at later tokens"):
        make_run([], None, looking_ahead)
    with pytest.raises(ConfigError, match="eval.allow_noncausal=true"):
        load_trained(for_run(of_run(trained)), convert_model=looking_ahead)
    make_run(["eval.allow_noncausal=true"], None, looking_ahead)
    found = load_trained(for_run(of_run(trained, "eval.allow_noncausal=true")), convert_model=looking_ahead)
    lengths: list[int] = []
    found.model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    "".join(continued(found))
    assert lengths == [2, 3, 4, 5, 6, 7]                 # it reads the whole text for every token


def test_a_text_is_written_by_such_a_router_only_if_that_command_allows_it(
        trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run records that training and evaluation may look ahead, which is no leave to write."""
    copy = shutil.copytree(trained, tmp_path / "run")
    recorded = (copy / "config.yaml").read_text()
    assert "allow_noncausal: false" in recorded
    (copy / "config.yaml").write_text(recorded.replace("allow_noncausal: false", "allow_noncausal: true"))
    words = [str(copy), "run.device=cpu", "router=expert_choice"]
    assert evaluate_run(for_run(words)).losses
    generate = ["generate", *words, "generate.tokens=2", "generate.prompt=ab"]
    assert main(generate) == 2 and "E-CONFIG-211" in capsys.readouterr().err
    assert main([*generate, "eval.allow_noncausal=true"]) == 0


def test_generation_warns_of_a_capacity(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An expert's limit grows with the tokens of the window."""
    words = ["generate", str(trained), "run.device=cpu", "generate.tokens=2", "generate.prompt=ab"]
    assert main(words) == 0 and "[warn] capacity" not in capsys.readouterr().err
    assert main([*words, "capacity=position"]) == 0
    assert "counts the tokens of a whole window in training" in capsys.readouterr().err

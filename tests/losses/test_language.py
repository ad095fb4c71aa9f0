"""Language losses: prompts are routed and not scored; no loss depends on how the batch is split."""

from itertools import product

import pytest
import torch

from moetrain.comm.mesh import lone_mesh
from moetrain.data.batches.batch import Batch
from moetrain.errors import ConfigError
from moetrain.losses.language import CrossEntropy, Head, token_cross_entropy
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.micro_batches import step_context
from tests.support.language_losses import (
    LOSSES,
    Preference,
    Prompted,
    WholeLogits,
    plain,
    prompted_run,
    prompted_steps,
)
from tests.support.oracle import oracle_loss
from tests.support.training import difference, make_run, snapshot, train_run, union, whole

STEPS = 2
BASE = ["run.dtype=float64", "data.min_length=0.5", "train.clip=0"]
PASSES = {"keep": [], "full": ["train.activation_checkpointing=full"], "count": ["train.count_pass=true"]}
FACTORS = [list(LOSSES), ("single", "ddp", "ep", "fsdp", "ep_fsdp", "fssdp"), (1, 2), (0, 20), list(PASSES)]
# kind, mesh, accumulation, head_chunk, passes
CASES = [("cross-entropy", "ep_fsdp", 2, 20, "full"), ("cross-entropy", "fssdp", 1, 0, "keep"),
         ("distillation", "fsdp", 2, 20, "keep"), ("consistency", "fsdp", 1, 0, "full"),
         ("consistency", "fssdp", 2, 20, "keep"), ("consistency", "ep", 2, 0, "count"),
         ("preference", "ddp", 2, 20, "count"), ("preference", "single", 4, 0, "full")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "accumulation" in metafunc.fixturenames:
        metafunc.parametrize("kind, mesh, accumulation, head_chunk, passes",
                             product(*FACTORS) if metafunc.config.getoption("--all") else CASES)


@pytest.fixture(scope="module")
def truths() -> dict:
    return {}


@pytest.mark.ranks
def test_every_loss_is_the_same_however_the_batch_is_split(
        ranks, truths, kind: str, mesh: str, accumulation: int, head_chunk: int, passes: str) -> None:
    if kind not in truths:
        truths[kind] = union([prompted_steps(kind, BASE, STEPS)])
    truth, world = truths[kind], 1 if mesh == "single" else 2
    words = [*BASE, f"parallel={mesh}", f"run.nproc={world}", f"train.head_chunk={head_chunk}",
             *PASSES[passes], f"train.micro_batch={16 // world // accumulation}"]
    ours = union([prompted_steps(kind, words, STEPS)] if world == 1 else
                 ranks(world).run(prompted_steps, kind, words, STEPS))
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(truth, what))
        assert error < 1e-10, (what, name, error)
    for mine, other in zip(ours.metrics, truth.metrics):
        for metric in ("tokens", "loss/ce", "loss/total", "loss/balance", "moe/entropy"):
            assert mine[metric] == pytest.approx(other[metric], rel=1e-11), metric


@pytest.mark.parametrize("kind", list(LOSSES))
def test_a_loss_and_its_gradients_are_those_of_the_plain_formula(kind: str) -> None:
    """A batch with two draws gives what two forward passes give, with draw 0 and 1."""
    words = [*BASE, "balance.weight=0", "loss.z.weight=0", "train.micro_batch=4"]
    trained = union([train_run(prompted_run(kind, words), 1)])
    run = prompted_run(kind, words)
    batch = Batch(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*run.loader.step(1))))
    context = step_context(run.config.run.seed, 1, batch)
    logits = [run.state.model(batch.tokens_BS, context._replace(draw=draw)).logits_BSV
              for draw in range(run.objective.language.draws)]
    assert kind != "consistency" or not torch.equal(*logits)
    value, terms = plain(kind, logits, batch)
    (value / terms).backward()
    assert trained.metrics[0]["loss/ce"] == pytest.approx((value / terms).item(), rel=1e-12)
    assert trained.metrics[0]["tokens"] == int(batch.valid_BS.sum()) > int(batch.scored_BS.sum())
    error, name = difference(trained.gradients, whole([snapshot(run, lambda parameter: parameter.grad)]))
    assert error < 1e-10, (name, error)


def test_prompts_are_balanced_and_not_scored() -> None:
    """Against the oracle: cross-entropy over the scored tokens, the balance loss over the valid ones."""
    words = [*BASE, "balance.weight=0.3"]
    trained, run = union([prompted_steps("cross-entropy", words, 1)]), prompted_run("cross-entropy", words)
    sizes, start = run.config.model, whole([snapshot(run, lambda parameter: parameter.data)])
    params = {name.removesuffix(".weight"): tensor.requires_grad_() for name, tensor in start.items()}
    total, ce, balance, counts = oracle_loss(
        params, [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(1)], balance_weight=0.3,
        z_weight=0.01, num_layers=sizes.num_layers, num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads, head_dim=sizes.dim // sizes.num_heads, top_k=sizes.top_k,
        num_experts=sizes.num_experts, qk_norm=sizes.qk_norm == "head")
    total.backward()
    metrics = trained.metrics[0]
    for metric, value in (("loss/total", total), ("loss/ce", ce), ("loss/balance", balance)):
        assert metrics[metric] == pytest.approx(value.item(), rel=1e-11), metric
    valid = sum(int(batch.valid_BS.sum()) for batch in run.loader.step(1))
    assert [int(count.sum()) for count in counts] == [valid * sizes.top_k] * 2
    error, name = difference({name.removesuffix(".weight"): grad for name, grad in trained.gradients.items()},
                             {name: tensor.grad for name, tensor in params.items()})
    assert error < 1e-10, (name, error)


def test_evaluation_is_per_scored_token() -> None:
    run = make_run([*BASE, "eval.windows=3"])
    model, mesh = run.state.model, lone_mesh(torch.device("cpu"))
    dataset = Prompted(run.dataset)
    found = evaluate(model, dataset, mesh, run.config, step=0).losses
    batch = dataset.batch(dataset.heldout_ids(0, 3))
    with torch.no_grad():
        logits = model(batch.tokens_BS, step_context(0, 0, batch, training=False)).logits_BSV
    value, terms = plain("cross-entropy", [logits], batch)
    assert found[f"loss/{dataset.measured[0]}"] == pytest.approx(float(value) / terms, rel=1e-12)


@pytest.mark.parametrize("loss, words, found", [
    (WholeLogits(), ["train.head_chunk=8"], "E-CONFIG-233"),
    (Preference(), ["train.micro_batch=1"], "E-CONFIG-234"),
    (Preference, [], "E-CONFIG-235"),
])
def test_what_cannot_be_computed_is_refused(loss, words: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_run(words, None, None, loss)
    assert caught.value.id == found


def test_a_loss_of_whole_logits_is_cross_entropy_without_chunks() -> None:
    ours, theirs = (train_run(make_run(BASE, None, None, loss), 1) for loss in (WholeLogits(), None))
    assert ours.metrics[0]["loss/ce"] == pytest.approx(theirs.metrics[0]["loss/ce"], rel=1e-13)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_rows_in_chunks_have_the_same_values_and_gradients(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    def leaves() -> tuple[torch.Tensor, torch.Tensor]:
        generator.manual_seed(0)
        return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
                     for shape in ((2, 4, 5), (7, 5)))

    targets_BS = torch.tensor([[1, -1, 3, 6], [0, 2, -1, 5]])
    values, grads = [], []
    for size in (0, chunk):
        states_BSD, head_VD = leaves()
        rows_BS = Head(head_VD, size).per_row(token_cross_entropy, states_BSD, targets_BS)
        (rows_BS * torch.arange(8).view(2, 4)).sum().backward()
        values.append(rows_BS)
        grads.append((states_BSD.grad, head_VD.grad))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert not values[0][targets_BS < 0].any()
    batch = Batch(targets_BS, targets_BS, targets_BS >= 0, targets_BS[:, 0], targets_BS[:, 0], None)
    torch.testing.assert_close(CrossEntropy().score(leaves()[0], Head(leaves()[1], chunk), batch),
                               values[0].sum())

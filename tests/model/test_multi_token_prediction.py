"""Multi-token prediction: losses and a gradient of the trunk by the equations of DeepSeek-V3, in numpy.

The oracle is written from arXiv 2412.19437, equations 21 to 25: it cuts sequences, where the model masks.
"""

import numpy as np
import pytest
import torch

from moetrain.data.batches.batch import Batch, padding
from moetrain.train.micro_batches import step_context
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.training import alone, difference, make_run, snapshot, whole

V, DEPTH, WEIGHT = 48, 2, 0.7
OPTIONS = ["run.dtype=float64", "model.norm_eps=0.01", "model.num_kv_heads=4", "model.first_dense_layers=1",
           "model.dense_dim=8", f"model.mtp_layers={DEPTH}", f"model.mtp_weight={WEIGHT}", "balance.weight=0",
           "loss.z.weight=0", "train.clip=0", "train.global_batch=4", "train.micro_batch=2"]
Tensors = dict[str, np.ndarray]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.01) * weight


def feed_forward(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, up = np.split(x @ gate_up.T, 2, -1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def block(p: Tensors, path: str, x: np.ndarray) -> np.ndarray:
    """Four heads of width 4, then two of eight experts with weights that sum to 1, or a dense network."""
    y = norm(x, p[f"{path}.attention_norm.weight"])
    qkv = (y @ p[f"{path}.attention.qkv.weight"].T).reshape(-1, 12, 4)
    turns = np.exp(1j * np.arange(len(x))[:, None] * np.array([1, 0.01]))
    heads = []
    for head in range(4):
        q, k = ((qkv[:, n, :2] + 1j * qkv[:, n, 2:]) * turns for n in (head, 4 + head))
        scores = np.where(np.tri(len(x), dtype=bool), (q @ k.conj().T).real / 2, -np.inf)
        heads.append(softmax(scores) @ qkv[:, 8 + head])
    x = x + np.concatenate(heads, -1) @ p[f"{path}.attention.out.weight"].T
    y = norm(x, p[f"{path}.ffn_norm.weight"])
    if f"{path}.ffn.down.weight" in p:
        return x + feed_forward(y, p[f"{path}.ffn.gate_up.weight"], p[f"{path}.ffn.down.weight"])
    probs, out = softmax(y @ p[f"{path}.moe.router.weight"].T), np.zeros_like(x)
    for token, best in enumerate(np.argsort(-probs)[:, :2]):
        for expert in best:
            of = f"{path}.moe.experts.{expert}"
            out[token] += probs[token, expert] / probs[token, best].sum() * feed_forward(
                y[token], p[f"{of}.gate_up"], p[f"{of}.down"])
    return x + out


def losses(p: Tensors, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Summed cross-entropies of one text, [1 + DEPTH]: of the next token, and of each module."""
    def cross_entropy(states: np.ndarray, wanted: np.ndarray) -> float:
        probs = softmax(states @ p["head"].T)
        return -sum(np.log(probs[i, token]) for i, token in enumerate(wanted) if token >= 0)

    x = p["embed"][tokens]
    for path in ("layers.0", "layers.1"):
        x = block(p, path, x)
    states = norm(x, p["norm.weight"])
    found = [cross_entropy(states, targets)]
    for k in range(1, DEPTH + 1):
        states, path = states[:len(tokens) - k], f"mtp.{k - 1}"
        if not len(states):
            return np.array([*found, *[0.0] * (1 + DEPTH - len(found))])
        combined = np.concatenate([norm(p["embed"][tokens[k:]], p[f"{path}.enorm.weight"]),
                                   norm(states, p[f"{path}.hnorm.weight"])], -1)
        states = norm(block(p, path, combined @ p[f"{path}.eh_proj.weight"].T), p[f"{path}.norm.weight"])
        found.append(cross_entropy(states, targets[k:]))
    return np.array(found)


def means(p: Tensors, batches: list[Batch]) -> tuple[float, float]:
    """Cross-entropy, and the mean over modules of theirs, both over the scored tokens of the step."""
    total, terms = np.zeros(1 + DEPTH), 0
    for batch in batches:
        for tokens, targets, valid, documents in zip(
                batch.tokens_BS.numpy(), batch.targets_BS.numpy(), batch.valid_BS.numpy(),
                [None] * len(batch.tokens_BS) if batch.documents_BS is None else batch.documents_BS.numpy()):
            terms += (targets >= 0).sum()
            texts = [valid] if documents is None else [valid & (documents == n) for n in set(documents)]
            for text in texts:
                if text.any():
                    total += losses(p, tokens[text], targets[text])
    return total[0] / terms, total[1:].sum() / DEPTH / terms


def parameters(run: Run) -> Tensors:
    return {name: tensor.numpy() for name, tensor in
            whole([snapshot(run, lambda parameter: parameter.data)]).items()}


def written(masked: bool) -> list[Batch]:
    """Two micro-batches: a prompt that is not scored, padding, and documents of 5, 1 and 6 tokens."""
    generator = torch.Generator().manual_seed(1)
    documents = torch.tensor([0] * 5 + [1] + [2] * 6).expand(2, -1)
    found = []
    for _ in range(2):
        text = torch.randint(0, V, (2, 13), generator=generator)
        targets, valid = text[:, 1:].clone(), torch.ones(2, 12, dtype=torch.bool)
        targets[0, :4], targets[1, 9:], valid[1, 9:] = -1, -1, False
        found.append(padding(2, 12, mask_documents=masked)._replace(
            tokens_BS=text[:, :-1].where(valid, 0), targets_BS=targets, valid_BS=valid,
            documents_BS=documents.contiguous() if masked else None))
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_a_gradient_of_the_trunk_are_those_of_the_equations(
        masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, batches = make_run(OPTIONS), written(masked)
    monkeypatch.setattr(run.loader, "step", lambda step: batches)
    before = {name: tensor.copy() for name, tensor in parameters(run).items()}
    metrics = train_step(run, 1).metrics
    ce, mtp = means(before, batches)
    assert metrics["loss/ce"] == pytest.approx(ce, rel=1e-10)
    assert metrics["loss/mtp"] == pytest.approx(mtp, rel=1e-10)
    assert metrics["loss/total"] == pytest.approx(ce + WEIGHT * mtp, rel=1e-10)
    gradients = whole([snapshot(run, lambda parameter: parameter.grad)])
    for name, place in (("layers.0.ffn.down.weight", (3, 5)), ("mtp.0.eh_proj.weight", (2, 20))):
        around = []
        for step in (-1e-5, 1e-5):
            moved = {**before, name: before[name].copy()}
            moved[name][place] += step
            ce, mtp = means(moved, batches)
            around.append(ce + WEIGHT * mtp)
        assert gradients[name][place].item() == pytest.approx((around[1] - around[0]) / 2e-5, rel=1e-6), name


def test_injected_auxiliary_losses_train_the_routers_of_the_modules_alike() -> None:
    options = [*OPTIONS, "balance.weight=0.1", "train.count_pass=true"]
    added, injected = (alone([*options, f"train.aux_loss={how}"], 1) for how in ("added", "injected"))
    assert difference(injected.gradients, added.gradients)[0] < 1e-12
    assert added.metrics[0]["loss/weighted/balance"] > 0 and list(added.counts[0]) == [
        "layers.1.moe", "mtp.0.moe", "mtp.1.moe"]
    # Each window has 12 tokens, all valid, of which the last ones have none ahead.
    assert [int(counts.sum()) for counts in added.counts[0].values()] == [2 * 4 * n for n in (12, 11, 10)]


def test_the_model_itself_is_the_one_without_modules() -> None:
    """Nothing is predicted further ahead unless a training step asks for it."""
    plain = [option for option in OPTIONS if "mtp" not in option]
    with_modules, without = make_run(OPTIONS), make_run(plain)
    batch = next(iter(without.loader.step(1)))
    ours, theirs = (run.state.model(batch.tokens_BS, step_context(0, 1, batch))
                    for run in (with_modules, without))
    assert ours.logits_BSV is not None and theirs.logits_BSV is not None and ours.ahead is None
    assert ours.logits_BSV.equal(theirs.logits_BSV) and list(ours.stats) == list(theirs.stats)

"""Held-out loss, domain by domain.

Windows are spread over the ranks of `batch`; every rank runs the same number of forward passes (with padding where it has
no window left), so expert parallelism never waits for a rank that has finished. Nothing of a run's state is touched.

    loss/<domain>            nats per token
    nats_per_byte/<domain>   nats per byte of text: comparable across tokenizers
    …/mean                   plain mean over domains

Beside them the choices of every router, domain by domain: which experts serve which text.
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import all_or_none, largest_over, sum_over
from moetrain.config.compose import run_dir
from moetrain.config.schema import Config
from moetrain.data.batch import Dataset, padding
from moetrain.data.loader import build_dataset
from moetrain.errors import CheckpointError
from moetrain.model.build import build_model
from moetrain.model.transformer import Transformer
from moetrain.ops.pinned import to_device
from moetrain.train.checkpoint.manifest import newest
from moetrain.train.checkpoint.reader import load_newest_model
from moetrain.train.objective import cross_entropy_sum
from moetrain.train.setup import join, prepare_on_main
from moetrain.train.passes import step_context


class Evaluation(NamedTuple):
    losses: dict[str, float]
    choices_ML: Tensor                       # int64: used slots by domain, and by expert of all routers in layer order


@torch.no_grad()
def evaluate(model: Transformer, dataset: Dataset, mesh: Mesh, config: Config,
             stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
    """Every domain. None once `stop` was true on a rank. Collective."""
    results: dict[str, float] = {}
    choices = []
    for index, domain in enumerate(dataset.domains):
        sums = _domain(model, dataset, index, mesh, config, stop)
        if sums is None:
            return None
        (nats, tokens, text_bytes), choices_L = sums[:3].tolist(), sums[3:].long()
        choices.append(choices_L)
        if tokens:
            name = "mean (domain)" if domain == "mean" else domain       # `mean` is the mean over domains
            results[f"loss/{name}"] = nats / tokens
            results[f"nats_per_byte/{name}"] = nats / max(1.0, text_bytes)
    for kind in ("loss", "nats_per_byte"):
        values = [value for name, value in results.items() if name.startswith(f"{kind}/")]
        results[f"{kind}/mean"] = sum(values) / max(1, len(values))
    return Evaluation(results, torch.stack(choices))


def _domain(model: Transformer, dataset: Dataset, domain: int, mesh: Mesh, config: Config,
            stop: Callable[[], bool]) -> Tensor | None:
    """[nats, tokens, bytes, choices of all experts] over all ranks, float64 on the host; None where one says stop.

    The host waits for the device once, at the end, besides its looks at the other ranks.
    """
    group = mesh["batch"]
    every = dataset.heldout(domain, windows=config.eval.windows, batch=config.eval.batch)
    mine = all_or_none(group, lambda: list(islice(every, group.position, None, group.size)))
    rounds = int(largest_over(group, len(mine)))
    model.eval()
    text_bytes, nothing = 0.0, padding(1, config.train.seq_len, mask_documents=config.data.mask_documents)
    sums = torch.zeros(2 + sum(model.routers.values()), dtype=torch.float64, device=mesh.device)
    for number in range(rounds):
        if largest_over(group, stop()):                  # a look at each other costs nothing beside a forward pass
            model.train()
            return None
        batch = mine[number] if number < len(mine) else nothing
        text_bytes += dataset.bytes_of_targets(batch)        # while it is on the host
        batch = batch.to(mesh.device)
        output = model(batch.tokens_BS, step_context(config.run.seed, 0, batch, training=False), batch.documents_BS)
        nats = cross_entropy_sum(output.logits_BSV, batch.targets_BS).double()
        head = torch.stack([nats, batch.valid_BS.sum().double()])
        sums += torch.cat([head, *(stats.counts_E.double() for stats in output.stats.values())])
    model.train()
    told = to_device(torch.tensor([text_bytes], dtype=torch.float64), mesh.device)
    return sum_over(group, torch.cat([sums[:2], told, sums[2:]])).cpu()


def load_trained(config: Config) -> tuple[Transformer, Dataset, Mesh, int]:
    """(model, dataset, mesh, step) of a run's newest checkpoint that is good."""
    directory = run_dir(config)
    if newest(directory) is None:
        raise CheckpointError(
            2, "the run has no checkpoint yet", where=str(directory / "checkpoints"),
            why="a run saves at its end and every checkpoint.interval steps", next="the command that trains the run; it saves at run.stop_at, too",
        )
    mesh = join(config)
    dataset = build_dataset(config, directory, prepare_on_main(config, directory, mesh))
    model = build_model(config, dataset.vocab_size, mesh)
    found = load_newest_model(model, directory, mesh, verify=config.checkpoint.verify)
    return model, dataset, mesh, found.manifest.values["step"]


def evaluate_run(config: Config) -> tuple[dict[str, float], Dataset, int]:
    """Losses of a run's newest checkpoint, its dataset and step. The caller prints."""
    model, dataset, mesh, step = load_trained(config)
    return evaluate(model, dataset, mesh, config).losses, dataset, step

"""Dump of the routers' logits and decisions in a few steps, for use by other programs (log.router_dump).

Every rank writes log/router/step-NNNNNNNN/rank-NNNN.safetensors, with these tensors for each micro-batch `m`:

    m/<router>/logits [T, E]     m/<router>/ids [T, K], -1 in unused slots; a router may have no logits
    m/valid [T], uint8           m/samples, m/domains [B], int64

The T tokens are those of B sequences of equal length, one after the other. The file's metadata has the names
of domains. docs/reference/files.md has a program that recomputes the balance loss.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, uint8

from moetrain.comm.agreement import on_all
from moetrain.comm.mesh import Mesh
from moetrain.data.batches.batch import Batch
from moetrain.errors import DiskError
from moetrain.routers.base import Decision
from moetrain.runs.files import prepare_rank_file, replace_atomically

STEPS = 3  # steps that are dumped in each attempt


class RouterDump:
    """Collector of a step's decisions on this rank, which writes them at its end; inactive after STEPS steps.

    Args:
        run_dir: directory of the run.
        mesh: all ranks.
        domains: names of the domains.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, domains: Sequence[str]) -> None:
        self.directory, self.mesh, self.domains = run_dir / "log" / "router", mesh, list(domains)
        self.left, self.tensors, self.micro_batches = STEPS, dict[str, Tensor](), 0

    @property
    def wanted(self) -> bool:
        """Whether this step is to be dumped."""
        return self.left > 0

    def add(self, batch: Batch, decisions: list[Decision]) -> None:
        """Collect the decisions for a micro-batch."""
        number, self.micro_batches = self.micro_batches, self.micro_batches + 1
        for router, logits_TE, ids_TK in decisions:
            self.tensors[f"{number}/{router}/ids"] = _copy(ids_TK)
            if logits_TE is not None:
                self.tensors[f"{number}/{router}/logits"] = _copy(logits_TE)
        self.tensors |= {f"{number}/valid": _copy(batch.valid_BS.flatten().to(uint8)),
                         f"{number}/samples": _copy(batch.sample_ids_B),
                         f"{number}/domains": _copy(batch.domains_B)}

    def write(self, step: int) -> None:
        """Write what was collected. Collective: a directory that cannot be written ends all ranks."""
        if not self.wanted:
            return
        path = self.directory / f"step-{step:08d}" / f"rank-{self.mesh.rank:04d}.safetensors"
        on_all(self.mesh, lambda: self._save(path, step), lambda why: DiskError(
            20, "a record of the run cannot be written", where=str(path), why=why,
            next="free space there, or log.router_dump=false; the same command resumes"))
        self.left, self.tensors, self.micro_batches = self.left - 1, {}, 0

    def _save(self, path: Path, step: int) -> None:
        from safetensors.torch import save

        prepare_rank_file(path, self.mesh.rank, self.mesh.size)
        with replace_atomically(path) as file:
            file.write(save(self.tensors, {"step": str(step), "ranks": str(self.mesh.size),
                                           "domains": json.dumps(self.domains)}))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()

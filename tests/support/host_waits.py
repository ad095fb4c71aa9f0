"""Golden table of the places where the host waits for the device, in a training step and besides.

    CASES            what is run on the simulated device, by name
    waits_of         what one of them waited for
    read, written    the table, tests/integration/host_waits.md
    difference       lines that tell what was added, and what is gone

`python -m tests.support.host_waits` measures all cases, or those that are named after it, and writes the
table anew.

The parts of a step are those that its stopwatch tells apart (train/loggers/stopwatch.py), with one more name
for what runs in backward, wherever it is called from.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from moetrain.data.tokenizers.tokenizer import ByteTokenizer
from moetrain.generate.sample import continue_text
from moetrain.train.checkpoint.snapshot import take_snapshot
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.loggers.stopwatch import Stopwatch
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.ranks import Ranks
from tests.support.simulated_device import RECORD
from tests.support.training import make_run

TABLE = Path(__file__).parents[1] / "integration" / "host_waits.md"
COLUMNS = ("case", "part", "place", "kind", "times")
HEAD = """# Where the host waits in a training step

Reads of the device, copies, sizes that depend on numbers of the device: all of the third step of the tiny
model, and of what is done beside steps, on rank 0 of a simulated device. The cases:
tests/support/host_waits.py. A wait that is added, or one that is gone, fails
tests/integration/test_simulated_device.py. After a change that is meant:

    python -m tests.support.host_waits

"""
STEPS = 3
LAYERS = 2                                   # of the tiny model, each with experts


class Case(NamedTuple):
    """One training step, or what is done beside steps.

    Args:
        overrides: of the tiny model.
        ranks: processes, each with a device.
        micro_batches: of a step.
        nodes: nodes that the ranks lie on.
        further: waits in layers, by place, beside the one for the rows that travel.
        steps: whether it is a step.
    """

    overrides: tuple[str, ...] = ()
    ranks: int = 1
    micro_batches: int = 1
    nodes: int = 1
    further: Mapping[str, int] = {}
    steps: bool = True

    @property
    def config(self) -> list[str]:
        dtype = [] if any(key.startswith("run.dtype") for key in self.overrides) else ["run.dtype=bfloat16"]
        return [*self.overrides, *dtype, f"train.micro_batch={16 // self.ranks // self.micro_batches}"]

    @property
    def in_layers(self) -> Counter[str]:
        """Waits that the budget has for the layers of the step, by place."""
        travelling = bool({"parallel=ep", "parallel=ep_fsdp", "parallel=fssdp"} & set(self.overrides))
        return Counter({SPLITS: LAYERS * self.micro_batches} if travelling else {}) + Counter(self.further)


SPLITS = "comm/exchange/base.py:read_splits"
HOST_COUNTS = {"moe/dispatch.py:_plan_alone": LAYERS}     # no kernel takes the counts of rows from the device
EP, FSSDP = ("parallel=ep",), ("parallel=fssdp", "planner=shadow")
# Copies always pay.
COPIES = ("hardware.flops=1e6", "hardware.latency_s=0", "hardware.inside=1e12", "hardware.between=1e12")
MESHES = {
    "single": Case(("parallel=single",)),
    "ddp": Case(("parallel=ddp",), ranks=2),
    "ep": Case(EP, ranks=2),
    "fsdp": Case(("parallel=fsdp",), ranks=2),
    "ep_fsdp": Case(("parallel=ep_fsdp",), ranks=2),
    "fssdp": Case(FSSDP, ranks=2),
}
# Not here: parallel.exchange=peer, whose ranks without kernels ask for each other's signals in a loop.
MODES = {
    "accumulation": Case(micro_batches=2),
    "count pass": Case(("train.count_pass=true",), micro_batches=2),
    "balance of a sequence": Case(("balance=sequence",)),
    "balance mode sync": Case(("balance.mode=sync",), micro_batches=2),
    "balance mode buffer": Case(("balance.mode=buffer",), micro_batches=2),
    "balance mode warm": Case(("balance.mode=warm",), micro_batches=2),
    "attached": Case(("train.aux_loss=injected",)),
    "sigmoid router in groups": Case(("router=sigmoid", "router.num_groups=4", "router.topk_groups=2")),
    "capacity by position": Case(("capacity=position",)),
    "capacity by probability": Case(("capacity=prob",)),
    "selective recomputation": Case(("train.activation_checkpointing=selective",)),
    "full recomputation": Case(("train.activation_checkpointing=full",)),
    "full recomputation in float32": Case(("train.activation_checkpointing=full", "run.dtype=float32"),
                                          further=HOST_COUNTS),
    "muon": Case(("optim=muon",)),
    "head in chunks": Case(("train.head_chunk=32",)),
    "documents": Case(("data.mask_documents=true",)),
    "float32": Case(("run.dtype=float32",), further=HOST_COUNTS),
    "float64": Case(("run.dtype=float64",), further=HOST_COUNTS),
    "odd widths": Case(("model.expert_dim=18",), further=HOST_COUNTS),
    "ep, accumulation": Case(EP, ranks=2, micro_batches=2),
    "ep, count pass": Case((*EP, "train.count_pass=true"), ranks=2, micro_batches=2),
    "ep, chunks": Case((*EP, "schedule=fixed", "schedule.chunks=2"), ranks=2),
    "ep, exact combine": Case((*EP, "parallel.exact_combine=true"), ranks=2),
    "ep, selective recomputation": Case((*EP, "train.activation_checkpointing=selective"), ranks=2),
    "ep, full recomputation": Case((*EP, "train.activation_checkpointing=full"), ranks=2),
    "ep, float32": Case((*EP, "run.dtype=float32"), ranks=2),
    "ep, two levels": Case((*EP, "parallel.exchange=two_level"), ranks=4, nodes=2),
    "fssdp, gathered again": Case((*FSSDP, *COPIES, "parallel.rematerialize=true"), ranks=2),
    "fssdp, calibrated": Case((*FSSDP, *COPIES, "parallel.calibrate=true"), ranks=2,
                              further={"moe/dispatch.py:_assign": LAYERS}),     # counts to calibrate by
    "fssdp, sliced": Case((*FSSDP, *COPIES, "parallel.max_sliced_experts=1", "parallel.rehome_interval=2"),
                          ranks=2),
}
BESIDE = "beside steps"
CASES = {**MESHES, BESIDE: Case(("data.vocab_size=257", "eval.windows=4", "eval.batch=2"), steps=False),
         **MODES}


class Entry(NamedTuple):
    """Waits of one kind at one place."""

    part: str                # of a step: data, forward, loss, backward, sums, update or metrics
    place: str               # file:function in moetrain
    kind: str


Waits = Mapping[Entry, int]


class _Parts(Stopwatch):
    """A stopwatch that tells the record which part of a step is running."""

    def __init__(self, run: Run) -> None:
        self.micro_batches = run.loader.micro_batches
        super().__init__(run.mesh.device)

    def restart(self) -> None:
        super().restart()
        RECORD.phase, self.left = "data", self.micro_batches

    def lap(self, name: str) -> None:
        super().lap(name)
        self.left -= name == "backward"
        following = {"data": "forward", "forward": "loss",
                     "backward": "forward" if self.left else "sums", "optim": "metrics"}
        RECORD.phase = following[name]

    def settle(self) -> None:
        super().settle()
        RECORD.phase = "update"


def waits_of(name: str) -> dict[Entry, int]:
    """Waits of the host in a case on this rank. Collective."""
    case = CASES[name]
    RECORD.clear()
    RECORD.phase = "start"
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(case.ranks // case.nodes)):
        run = make_run([*case.config, "run.device=cuda"])
    (_last_step if case.steps else _beside_steps)(run)
    found: Counter[Entry] = Counter()
    for wait, times in RECORD.items():
        found[Entry("backward" if wait.backward else wait.phase, wait.place, wait.kind)] += times
    return dict(found)


def _last_step(run: Run) -> None:
    run.watch = _Parts(run)
    for step in range(1, STEPS + 1):
        RECORD.clear()
        train_step(run, step)


def _beside_steps(run: Run) -> None:
    """The start has been recorded; an evaluation, what a save copies, a text of three tokens."""
    RECORD.phase = "evaluation"
    evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    RECORD.phase = "save"
    take_snapshot(run.state, run.mesh)
    RECORD.phase = "generation"
    "".join(continue_text(run.state.model, ByteTokenizer(), "ab", end_id=256, tokens=3, temperature=0,
                          top_p=1, seed=0, run_seed=0, step=STEPS, context=8, cache=True,
                          mask_documents=False, group=run.mesh["batch"]))


def read(table: Path = TABLE) -> dict[str, dict[Entry, int]]:
    """The table by case; empty where there is none yet."""
    found: dict[str, dict[Entry, int]] = {}
    lines = table.read_text().splitlines() if table.exists() else []
    for line in [line for line in lines if line.startswith("|")][2:]:
        case, part, place, kind, times = (cell.strip() for cell in line.strip("|").split("|"))
        found.setdefault(case, {})[Entry(part, place, kind)] = int(times)
    return found


def written(cases: Mapping[str, Waits]) -> str:
    """The table as Markdown."""
    rows = [(case, *entry, str(times)) for case, waits in cases.items()
            for entry, times in sorted(waits.items())]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
    rule = ["-" * width for width in widths]
    lines = [_line(row, widths) for row in (COLUMNS, rule, *rows)]
    return HEAD + "\n".join(lines) + "\n"


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |"


def difference(case: str, measured: Waits, golden: Waits) -> str:
    """Lines that tell how the waits of a case differ from the table; empty where they do not."""
    lines = []
    for entry in sorted({*measured, *golden}):
        now, then = measured.get(entry, 0), golden.get(entry, 0)
        if now != then:
            lines.append(f"{case}: {entry.place} in the part {entry.part}: {entry.kind}, {now} times; "
                         f"{then} in {TABLE.name}")
    return "\n".join(lines)


def main(names: Sequence[str]) -> None:
    """Measure these cases, or all, and write them to the table."""
    table = read()
    for ranks in sorted({case.ranks for case in CASES.values()}):
        wanted = [name for name, case in CASES.items()
                  if case.ranks == ranks and (name in names or not names)]
        if not wanted:
            continue
        with Ranks(ranks, simulated=True) as pool:
            for name in wanted:
                measured = pool.run(waits_of, name)[0]
                print(difference(name, measured, table.get(name, {})) or f"{name}: as before", flush=True)
                table[name] = measured
                TABLE.write_text(written({name: table[name] for name in CASES if name in table}))


if __name__ == "__main__":
    main(sys.argv[1:])

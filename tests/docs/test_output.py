"""Words of banner and step line are on docs/reference/output.md, and samples on pages are the program's."""

import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.__main__ import main
from moetrain.comm import device
from moetrain.config.groups import group_options
from moetrain.config.values import as_tree, leaves
from moetrain.train.loggers.banner import banner_lines
from moetrain.train.loggers.console import banner
from moetrain.train.loggers.step_line import step_line
from moetrain.train.state import Graphs, Run
from tests.support import output_page
from tests.support.training import make_run

MANY = [                                                 # of four ranks
    ["parallel=ddp", "balance=node", "balance.mode=sync", "loss=[z,micro_balance]", "optim=muon"],
    ["parallel=ep", "balance=micro", "router=sigmoid", "router.counts=micro", "capacity=prob"],
    ["parallel=ep_fsdp", "parallel.ep=2", "parallel.exchange=two_level", "parallel.exact_combine=true",
     "schedule=fixed", "schedule.chunks=4", "capacity=position", "capacity.scope=local",
     "checkpoint.interval=5"],
    ["parallel=fssdp", "parallel.collective=two_level", "parallel.rematerialize=true",
     "parallel.max_sliced_experts=2", "parallel.forecast=trend",
     "train.activation_checkpointing=full", "train.count_pass=true"],
    ["parallel=fsdp", "log.wandb=online", "log.wandb_entity=me", "log.wandb_group=night"],
    ["parallel=fssdp", "parallel.rehome_interval=0", "parallel.calibrate=true", "balance=none",
     "~balance.weight", "train.activation_checkpointing=selective"],
]
ONE = [["parallel=single", "log.wandb=offline", "router=stochastic", "router.granularity=batch"],
       ["parallel=single", "balance=sequence", "model.mtp_layers=2"]]
METRICS = {"step": 1200, "loss/ce": 3.1416, "lr": 2.9e-4, "grad_norm": 0.8, "loss/balance": 1.02,
           "loss/z": 12.0, "moe/max_violation/max": 0.18, "moe/dead_experts": 0, "moe/drop_fraction": 0.0,
           "time/step": 1.27, "throughput/tokens_per_s": 412345.0, "throughput/mfu": 0.4,
           "memory/peak": 33.1 * 2**30}


@pytest.fixture(scope="module")
def banners(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, set[Any]]]:
    """Of every composition, with the names that are not the program's words."""
    folder = tmp_path_factory.mktemp("text")
    (folder / ".hidden").write_text("not read")
    (folder / "a.txt").write_text("".join(f"a sentence with the number {number}. " for number in range(400)))
    text = ["data=text", "~data.vocab_size", f"data.path={folder}", f"data.cache={folder}"]
    found = [shown(make_run(overrides)) for overrides in [*ONE, text]]
    with pytest.MonkeyPatch.context() as patch:          # a machine with a GPU, and a torch without CUDA
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.version, "cuda", None)
        patch.setattr(device, "has_gpu", lambda: True)
        found.append(shown(make_run(["parallel=single", "run.device=auto"])))
    with FakeRanks(4):
        found += [shown(make_run(["train.micro_batch=2", *overrides])) for overrides in MANY]
        run = make_run(["parallel=ddp", "train.micro_batch=2", "run.dtype=bfloat16"])
        for kept in (True, False):                       # as decided by memory
            run.graphs, run.state.step = Graphs(kept, 10**9, 10**10), 7
            found.append(shown(run))
    return found


def shown(run: Run) -> tuple[str, set[Any]]:
    resumed = run.directory if run.state.step else None
    options = {option for options in group_options().values() for option in options}
    values = {str(value) for _, value in leaves(as_tree(run.config))}
    names = {*run.dataset.domains, run.dataset.fingerprint[:12], run.mesh.device.type, run.directory,
             *run.objective.weights}
    return banner(banner_lines(run, resumed)), values | names | options


class FakeRanks:
    """A process group whose collectives do nothing: enough to lay out a run of several ranks and say so."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.environment = {"RANK": "0", "WORLD_SIZE": str(size),
                            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(size)}

    def __enter__(self) -> None:
        os.environ |= self.environment
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.size)

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
        for name in self.environment:
            del os.environ[name]


def test_every_word_of_a_banner_is_defined(banners: list[tuple[str, set[Any]]]) -> None:
    assert {text: found for text, names in banners
            if (found := output_page.undefined_in_banner(text, names))} == {}
    seen = {label for text, _ in banners for label in output_page.labels(text)}
    # And no row is on the page alone.
    assert seen == output_page.defined("Banner") - set(output_page.words("first line"))


def test_a_word_that_is_not_defined_is_found(banners: list[tuple[str, set[Any]]]) -> None:
    text, names = banners[0]
    assert output_page.undefined_in_banner(text.replace("total", "grand"), names) == {"grand"}
    assert output_page.undefined_in_banner(f"{text}\nweather  fine", names) == {"weather"}
    line = "step 1/2  loss 3.1 nats | 412k tok/s flux 3 | 1.27s eta 3h06"
    assert output_page.undefined_in_step_line(line) == {"flux"}


def test_every_word_of_a_step_line_is_defined() -> None:
    line = step_line(METRICS, 10000, 700)
    assert not output_page.undefined_in_step_line(line, ["z"])
    assert set(output_page.words(line)) - {"z"} == output_page.defined("Step line")


def test_epochs_are_planned_steps_over_the_text(banners: list[tuple[str, set[Any]]]) -> None:
    (text,) = [text for text, _ in banners if "data      text" in text]
    tokens, epochs = re.search(r"  ([\d.]+) k tokens, ([\d.]+) epochs planned", text).groups()
    # steps x sequences x their tokens
    assert float(epochs) == pytest.approx(20 * 16 * 12 / (1000 * float(tokens)), rel=0.05)


def test_help_names_the_page(capsys: pytest.CaptureFixture) -> None:
    for words in (["--help"], ["train", "--help"]):
        assert main(words) == 0
        assert "docs/reference/output.md" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/reference/output.md"])
def test_the_sample_of_a_page_is_what_the_program_prints(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample has the quickstart's rows in order, and the same words; figures may be of another day."""
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    text, lines = output_page.sample((output_page.ROOT / page).read_text(encoding="utf-8"))
    with FakeRanks(2):
        run = make_run(["~loss.z", "parallel=ep", "run.nproc=2", "train.micro_batch=8", "log.wandb=auto"])
    ours = banner(banner_lines(run, None))
    assert output_page.labels(text) == output_page.labels(ours)
    theirs = ["runs/quickstart", "cpu ep float32", "0d3aefe1df68 text cpp docs notices python stubs"]
    assert not output_page.undefined_in_banner(text, theirs)
    metrics = {name: value for name, value in METRICS.items() if name not in ("loss/z", "throughput/mfu")}
    said = output_page.words(step_line(metrics, 800, 0.0))
    assert lines and all(output_page.words(line) == said for line in lines)

"""Device of a rank, and what a user is told where a GPU cannot be used: no traceback, and one thing to do."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from moetrain import machine
from moetrain.__main__ import main
from moetrain.comm import device as devices
from moetrain.comm.device import cuda_obstacle, explained, pick_device, take_device, unused_gpu
from moetrain.config.compose import compose
from moetrain.errors import ConfigError
from tests.support import device_process, simulated_device

# As torch 2.13 words them (c10/cuda/CUDAFunctions.cpp, torch/csrc/cuda/Module.cpp).
NO_DRIVER = ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed "
             "a driver from http://www.nvidia.com/Download/index.aspx")
OLD_DRIVER = ("The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
              "driver by downloading and installing a new version from the URL: "
              "http://www.nvidia.com/Download/index.aspx")
NO_GPU = "No CUDA GPUs are available"
UNKNOWN = ("CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env "
           "variable CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero.\n"
           "more lines")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def rank(number: int, of: int) -> None:
        monkeypatch.setenv("LOCAL_RANK", str(number))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of))

    return rank


def test_every_rank_has_a_gpu_of_its_own(two_gpus):
    two_gpus(1, of=2)
    assert pick_device(compose([])) == torch.device("cuda", 1)
    assert pick_device(compose(["run.device=cpu"])) == torch.device("cpu")


def test_a_rank_without_a_gpu_says_so(two_gpus):
    two_gpus(2, of=3)
    with pytest.raises(ConfigError, match="no GPU for rank 2 of this machine") as error:
        pick_device(compose([]))
    assert "torch sees 2" in str(error.value)
    assert "run.nproc=2" in str(error.value) and "run.share_gpu=true" in str(error.value)
    two_gpus(0, of=4)                              # a launcher that shows each rank its own GPU as the first
    assert pick_device(compose([])) == torch.device("cuda", 0)


def test_gpus_can_be_shared_in_turn(two_gpus):
    found = []
    for number in range(4):
        two_gpus(number, of=4)
        found.append(pick_device(compose(["run.share_gpu=true"])).index)
    assert found == [0, 1, 0, 1]


@pytest.mark.parametrize("said, visible, why, advice", [
    (NO_DRIVER, None, "no NVIDIA driver", "--gpus all"),
    (OLD_DRIVER, None, "driver 550.54.14 serves CUDA 12.4, and torch .* was built for CUDA 13.0",
     "a driver for CUDA 13.0"),
    (NO_GPU, "", "CUDA_VISIBLE_DEVICES='' leaves no GPU", "unset CUDA_VISIBLE_DEVICES"),
    (NO_GPU, "7", "CUDA_VISIBLE_DEVICES='7'", "unset"),
    (NO_GPU, None, NO_GPU, "nvidia-smi"),
    (UNKNOWN, "0", "CUDA unknown error [^\n]*zero.$", "nvidia-smi"),
], ids=["no driver", "old driver", "hidden", "no such GPU", "no GPU", "unknown"])
def test_what_torch_says_becomes_one_reason_and_one_thing_to_do(said, visible, why, advice, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "gpu_driver", lambda: "550.54.14")
    found = explained(said, visible)
    assert re.search(why, found.why) and advice in found.advice


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_cpu_build_of_torch_is_named_with_what_brings_another(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert main(["train", "experiment=debug", "run.device=cuda", f"run.dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("E-CONFIG-090") and "is a CPU build" in said and "run.device=cpu" in said
    assert "Traceback" not in said
    auto = compose(["experiment=debug"])
    monkeypatch.setattr(devices, "has_gpu", lambda: False)
    assert pick_device(auto) == torch.device("cpu") and unused_gpu(auto) == ""
    assert "pip" not in cuda_obstacle().advice
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    release = torch.__version__.partition("+")[0]
    assert f"pip install --force-reinstall torch=={release}" in unused_gpu(auto)
    assert "\n" not in unused_gpu(auto)
    assert unused_gpu(compose(["experiment=debug", "run.device=cpu"])) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")       # hidden on purpose
    assert unused_gpu(auto) == ""


def test_an_error_of_the_driver_is_asked_for_without_torchs_warning(monkeypatch, recwarn):
    def unavailable() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old")
        return False

    def init() -> None:
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=r"E-CONFIG-090(.*\n)+.*serves CUDA 12.4") as error:
        pick_device(compose(["run.device=cuda"]))
    assert error.value.where == "run.device" and not recwarn.list


@pytest.mark.parametrize("said, advice", [
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\n"
     "CUDA kernel errors might be reported later", "nvidia-smi names"),
    ("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
     "CUDA_VISIBLE_DEVICES=<number of another>"),
    ("CUDA error: no kernel image is available for execution on the device",
     "a torch that was built for this GPU"),
], ids=["busy", "full", "other architecture"])
def test_a_gpu_that_refuses_its_first_work_is_one_error(said, advice, monkeypatch):
    def refuse(device: torch.device) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(ConfigError, match="E-CONFIG-110  GPU 3 cannot be used") as error:
        take_device(torch.device("cuda", 3))
    assert error.value.why.startswith(said.splitlines()[0]) and "\n" not in error.value.why
    assert advice in error.value.next
    assert ("sm_80 sm_90" in error.value.why) == ("kernel image" in said)
    take_device(torch.device("cpu"))


def test_one_gpu_of_several_is_chosen_by_the_environment(capsys):
    assert main(["train", "run.device=cuda:1"]) == 2
    said = capsys.readouterr().err
    assert "E-CONFIG-005" in said
    assert "try     CUDA_VISIBLE_DEVICES=1 before the same command with run.device=cuda" in said


@pytest.mark.parametrize("text, driver", [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"
     "GCC version:  gcc version 12.3.0\n", "535.129.03"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n",
     "580.65.06"),
    (None, None),
])
def test_the_machine_tells_its_driver_and_whether_it_has_a_gpu(text, driver, tmp_path: Path, monkeypatch):
    told, file = tmp_path / "version", tmp_path / "nvidia0"
    if text:
        told.write_text(text)
    assert machine.gpu_driver(told) == driver
    monkeypatch.setattr(machine, "gpu_memory", lambda: None)
    assert not machine.has_gpu(file)
    file.touch()
    assert machine.has_gpu(file)


@pytest.mark.ranks
@pytest.mark.skipif(bool(simulated_device.unavailable()),
                    reason=simulated_device.unavailable() or "there is one")
def test_more_ranks_than_gpus_are_one_error_and_missing_kernels_one_warning(tmp_path: Path):
    environment = device_process.environment() | {"MOETRAIN_KERNELS": "1"}
    command = [sys.executable, "-m", "moetrain", "train", "experiment=debug", "parallel=ddp", "run.nproc=2",
               "run.device=cuda",
               f"run.dir={tmp_path / 'run'}", "log.wandb=off"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count("E-CONFIG-092") == 1 and "Traceback" not in said, said
    assert "run.nproc=1" in said and "run.share_gpu=true" in said
    assert said.count("no compiled kernels, plain torch runs instead") == 1

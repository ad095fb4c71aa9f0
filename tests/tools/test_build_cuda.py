"""The build of the CUDA library: messages without nvcc, spills in ptxas's output, every kernel compiles."""

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.ops import extension
from tools import build_cuda

ROOT = Path(__file__).parents[2]
LOG = """
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90a'
ptxas info    : Function properties for _Z5firstPf
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 80 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90a'
ptxas info    : Function properties for _Z6secondPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""


def test_registers_and_spills_are_read_from_what_the_assembler_says():
    assert build_cuda.kernels_of(LOG) == {"_Z5firstPf sm_90a": (80, 44), "_Z6secondPf sm_90a": (32, 0)}


def test_a_new_spill_is_wrong_and_other_registers_are_a_change():
    found = build_cuda.kernels_of(LOG)
    wrong, changed = build_cuda.compare(found, {"_Z5firstPf sm_90a": [80, 44], "_Z6secondPf sm_90a": [30, 0]})
    assert not wrong and changed == ["_Z6secondPf sm_90a: 32 registers, before 30"]
    wrong, _ = build_cuda.compare(found, {"_Z5firstPf sm_90a": [80, 0]})
    assert wrong == ["_Z5firstPf sm_90a: spills 44 bytes, before 0"]


def test_every_source_has_its_op_and_no_kernel_spills():
    names = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    assert names and all((ROOT / "moetrain" / "ops" / f"{name}.py").exists() for name in names)
    stored = build_cuda.json.loads(build_cuda.BASELINE.read_text())
    assert stored and all(spilled == 0 for _, spilled in stored.values())


def test_without_nvcc_the_build_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(build_cuda, "USUAL_PLACE", tmp_path / "nvcc")
    with pytest.raises(SystemExit, match="no nvcc"):
        build_cuda.find_nvcc()


@pytest.mark.slow
def test_all_kernels_compile_for_hopper_without_new_spills():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    command = [sys.executable, "tools/build_cuda.py", "--check", "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 bytes spilled in all" in done.stdout


def test_kernels_are_off_unless_asked_for(monkeypatch, caplog):
    monkeypatch.delenv(extension.SWITCH, raising=False)
    assert "not set" in extension.load() and not caplog.records


def test_what_stands_in_the_way_of_kernels_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(extension.SWITCH, "1")
    caplog.set_level(logging.WARNING)
    if torch.version.cuda is None:
        assert "without CUDA" in extension.load() and len(caplog.records) == 1
    monkeypatch.setattr(torch.version, "cuda", "13.0")   # as a torch with CUDA would say
    library, sources = tmp_path / "_C_cuda.so", tmp_path / "csrc"
    caplog.clear()
    assert "build_cuda.py" in extension.load(library, sources) and len(caplog.records) == 1

    library.write_bytes(b"no library")
    sources.mkdir()
    (sources / "op.cu").write_text("// one")
    assert "other sources" in extension.load(library, sources)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: [(9, 0), (8, 6)][number])
    extension.write_label(library, ["90a", "80"], "13.0", sources)
    caplog.clear()
    said = extension.load(library, sources)
    assert "cannot be loaded" in said and "build_cuda.py" in said and "\n" not in said
    assert len(caplog.records) == 1
    eighty_six = r"built for 90a, and GPU 1 has compute capability 8.6; .*build_cuda.py --archs 86 makes it"
    for archs, cuda, why in ((["90a"], "12.8", eighty_six),
                             (["80"], "12.8", r"GPU 0 has compute capability 9.0; .* --archs 90a"),
                             (["90a", "89"], "13.0", "GPU 1"), (["90", "86"], "13.0", "cannot be loaded"),
                             (["90a", "80"], "14.1",
                              r"by CUDA 14.1, and this torch by 13.0; .*build_cuda.py")):
        extension.write_label(library, archs, cuda, sources)
        assert re.search(why, extension.load(library, sources)), (archs, cuda)
    (sources / "op.cu").write_text("// two")
    assert "other sources" in extension.load(library, sources)

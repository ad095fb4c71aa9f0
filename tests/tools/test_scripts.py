"""Shell scripts: shellcheck finds nothing, and .ci/run installs what tests need or says what is missing."""

import subprocess
from pathlib import Path

import pytest
import yaml

from moetrain.__main__ import main
from tests.support import needs

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tools/**/*.sh"),
                  ROOT / ".ci" / "run"])
ABSENT = "not installed: g++ munge shellcheck slurm-wlm"


def shellcheck(*files: Path) -> subprocess.CompletedProcess:
    needs.programs("shellcheck", packages="shellcheck")
    command = ["shellcheck", "--external-sources", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    assert len(SCRIPTS) > 6
    done = shellcheck(*SCRIPTS)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing_in_the_job_of_moetrain_slurm(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "--dry-run", "--nodes=2", "parallel=ep", "run.dir=it's a run", "loss=[z]"]) == 0
    job = tmp_path / "job.sbatch"
    job.write_text(capsys.readouterr().out)
    done = shellcheck(job)
    assert done.returncode == 0, done.stdout


def test_shellcheck_looks(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/bash\nrm -r $1\n")
    assert "SC2086" in shellcheck(tmp_path / "job.sh").stdout


def test_hooks_of_pre_commit_download_nothing_and_name_files_that_are_there() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        program, _, module, *words = hook["entry"].split()
        assert hook["language"] == "system" and program == "python" and module in ("ruff", "pytest")
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))


@pytest.fixture
def ci(tmp_path: Path) -> Path:
    """A copy of .ci/run with a stand-in for the suite, on a machine that has bash and coreutils alone."""
    for folder in (".ci", "tools", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text().replace(":/usr/sbin:/sbin", ""))
    (tmp_path / "tools" / "test.sh").write_text('echo "suite: ${MOETRAIN_TESTS_NEED_ALL:-0}"\n')
    for name in ("bash", "sort", "mktemp", "timeout", "tail", "rm", "sleep", "dirname", "touch", "chmod"):
        found = subprocess.run(["which", name], text=True, capture_output=True).stdout.strip()
        (tmp_path / "bin" / name).symlink_to(found)
    program(tmp_path, "id", "echo 0")
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!{folder}/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("apt, said", [
    ("for name in slurmctld slurmd munged shellcheck g++; do touch {bin}/$name; chmod +x {bin}/$name; done",
     "suite: 1"),
    ("echo no network; exit 1", "no network"),
    ("sleep 60", ABSENT),
    (None, ABSENT)], ids=["installs", "fails", "hangs", "no apt-get"])
def test_ci_installs_what_tests_need_or_says_what_is_missing(ci: Path, apt: str | None, said: str) -> None:
    if apt:
        program(ci, "apt-get", apt.format(bin=ci / "bin"))
    command = [ci / "bin" / "bash", ci / ".ci" / "run"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=30,
                          env={"PATH": str(ci / "bin"), "APT_LIMIT_S": "1"})
    assert done.returncode == 0 and said in done.stdout, done
    end = "suite: 1\n" if said == "suite: 1" else "are skipped\nsuite: 0\n"
    assert done.stdout.endswith(end) and not done.stderr


def test_a_skip_that_an_installation_removes_fails_where_all_is_installed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    for value, outcome in (("0", pytest.skip.Exception), ("1", pytest.fail.Exception)):
        monkeypatch.setenv("MOETRAIN_TESTS_NEED_ALL", value)
        with pytest.raises(outcome, match="apt-get install no-such-package"):
            needs.programs("no-such-program", packages="no-such-package")

"""Shell scripts: shellcheck has nothing to say, and .ci/run installs what tests need or says what is missing."""

import subprocess
from pathlib import Path

import pytest

from tests.support import needs

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tools/**/*.sh"), ROOT / ".ci" / "run"])


def test_shellcheck_has_nothing_to_say() -> None:
    needs.programs("shellcheck", packages="shellcheck")
    assert len(SCRIPTS) > 6
    done = subprocess.run(["shellcheck", "--external-sources", *map(str, SCRIPTS)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def ci(tmp_path: Path) -> Path:
    """A copy of .ci/run whose suite prints what it is told, on a machine that has bash and coreutils alone."""
    for folder in (".ci", "tools", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text().replace(":/usr/sbin:/sbin", ""))
    (tmp_path / "tools" / "test.sh").write_text('echo "suite: ${MOETRAIN_TESTS_NEED_ALL:-0}"\n')
    for name in ("bash", "sort", "mktemp", "timeout", "tail", "rm", "sleep", "dirname", "touch", "chmod"):
        (tmp_path / "bin" / name).symlink_to(subprocess.run(["which", name], text=True, capture_output=True).stdout.strip())
    program(tmp_path, "id", "echo 0")
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!{folder}/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("apt, said", [
    ("for name in slurmctld slurmd munged shellcheck g++; do touch {bin}/$name; chmod +x {bin}/$name; done", "suite: 1"),
    ("echo no network; exit 1", "no network"),
    ("sleep 60", "not installed: g++ munge shellcheck slurm-wlm"),
    (None, "not installed: g++ munge shellcheck slurm-wlm")], ids=["installs", "fails", "hangs", "no apt-get"])
def test_ci_installs_what_tests_need_or_says_what_is_missing(ci: Path, apt: str | None, said: str) -> None:
    if apt:
        program(ci, "apt-get", apt.format(bin=ci / "bin"))
    done = subprocess.run([ci / "bin" / "bash", ci / ".ci" / "run"], env={"PATH": str(ci / "bin"), "APT_LIMIT_S": "1"}, text=True,
                          capture_output=True, timeout=30)
    assert done.returncode == 0 and said in done.stdout, done
    assert done.stdout.endswith("suite: 1\n" if said == "suite: 1" else "are skipped\nsuite: 0\n") and not done.stderr


def test_a_skip_that_an_installation_removes_fails_where_all_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, outcome in (("0", pytest.skip.Exception), ("1", pytest.fail.Exception)):
        monkeypatch.setenv("MOETRAIN_TESTS_NEED_ALL", value)
        with pytest.raises(outcome, match="apt-get install no-such-package"):
            needs.programs("no-such-program", packages="no-such-package")

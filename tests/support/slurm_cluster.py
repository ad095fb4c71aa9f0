"""A Slurm cluster of two nodes on this machine, as this user, with nothing outside a temporary directory."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.ranks import free_port
from tests.support.runs import environment, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


class Cluster:
    """Jobs of a running cluster. `environment` is what its programs need."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**environment(), "SLURM_CONF": str(folder / "slurm.conf"), "PATH": needs.PATH}

    def call(self, *command: str, **settings: str) -> str:
        done = subprocess.run(command, env={**self.environment, **settings}, text=True, capture_output=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def finished(self, number: str, limit_s: float = 300) -> dict[str, str]:
        """The job, once it has ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.state(number) in ended, limit_s)
        return self.job(number)

    def empty(self) -> None:
        for number in self.call("squeue", "--noheader", "--format=%A").split():
            self.call("scancel", number)
        until(lambda: not self.call("squeue", "--noheader"), 30)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    needs.programs(*PROGRAMS, packages="slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    daemons = []
    try:
        _configure(folder)
        cluster = Cluster(folder)
        slurm = ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]
        for command in (_munged(folder), *slurm):
            log = (folder / f"{'-'.join(command[:1] + command[3:])[:20].replace('/', '_')}.out").open("wb")
            daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log,
                                            cwd=folder))
            log.close()
            if command[0] == "munged":
                until((folder / "munge" / "socket").exists, 10)
        _wait(cluster, folder)
        yield cluster
        cluster.empty()
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(cluster: Cluster, folder: Path, limit_s: float = 40) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done = subprocess.run(["sinfo", "--noheader", "--format=%D %t"], env=cluster.environment,
                              text=True, capture_output=True)
        if done.stdout.strip() == "2 idle":
            return
        time.sleep(0.2)
    files = [*folder.glob("*.log"), *folder.glob("*.out")]
    logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in files)
    pytest.skip(f"Slurm is installed and does not run here:\n{logs}")


def _munged(folder: Path) -> list[str]:
    munge = folder / "munge"
    return ["munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"]


def _configure(folder: Path) -> None:
    folder.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    user = subprocess.run(["id", "-un"], text=True, capture_output=True).stdout.strip()
    nodes = "\n".join(f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
                      "CPUs=2 RealMemory=1000 Gres=gpu:2" for number in (1, 2))
    for number in range(2):                              # plain files in the place of a GPU's device
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
""")

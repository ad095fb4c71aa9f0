"""Emulated nodes on one machine: every rank gets a network of its own, with limited links to the others.

    python -m tools.netlab --inside 900mbit --between 100mbit -- moetrain train parallel=ep run.steps=20
    python -m tools.netlab --nodes 2 --per-node 2 --inside 900mbit --between 100mbit --measure

A rank has two full-duplex links, as a GPU has in a cluster: `inside` to the ranks of its own emulated node
and `between` to all others. Every rank is a network namespace with one veth device a link, and the routing
table picks the device by address:

    rank 10.77.<node>.<1 + rank in node>
        device inside  ──rate── bridge of its node ──rate── ranks of that node
        device between ──rate── one bridge for all ──rate── every other rank

The rate is set at both ends of the rank's cable (tbf, or htb where the kernel has no tbf), so that what a
rank receives is limited like what it sends. The bridges are as fast as this machine. One device a link, not
one device with a class for each destination: no packet filter is needed, and the kernel counts the bytes of
each link (Lab.sent). Rates only: no delay is added.

Nothing has a name outside of the namespaces, and when this process ends, in whatever way, what runs in them
is killed from inside. So a killed run leaves nothing behind, labs do not meet, and the bridges are out of
reach of the machine's firewall. Needs Linux with veth, bridge and tbf or htb, and either root or user
namespaces. docs/howto/emulated_links.md is the guide.

tools/netlab/processes.py waits for the ranks, tools/netlab/measure.py is --measure.
"""

import argparse
import functools
import math
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tools.netlab.measure import measure
from tools.netlab.processes import LabError, end, together

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
LINKS = ("inside", "between")
ROOT = Path(__file__).parents[2]
PORT = 29500                   # free in a new network
MTU = 9000
SETUP_S = 120.0                # for each program that makes the networks; an idle machine needs under 1 s
CLOSE_S = 30.0                 # for all of them to go

# Holds a network until this process's end of its input closes, at the latest when this process is gone. Then
# it kills what runs in there: once more when it found something, which may have started another. `/proc` must
# be that of its own process numbers. All words are the shell's own.
HOLDER = """
read hello && echo && read end
[ /proc/self -ef /proc/$$ ] || exit
for pass in 1 2 3 4 5; do
    found=
    for process in /proc/[0-9]*; do
        if [ $process/ns/net -ef /proc/$$/ns/net ] && [ $process != /proc/$$ ]
        then found=1; kill -9 ${process#/proc/}; fi
    done
    [ $found ] || exit
done 2>/dev/null
"""
# A rank that gets here after this process, and perhaps its network's holder, is gone does not start.
RANK = '[ $PPID = "$0" ] && exec "$@"'

# tc commands for a device. The queue is deep enough that several senders to one rank wait for each other
# rather than lose packets.
SHAPERS = {
    "tbf": ("qdisc add dev {device} root tbf rate {rate}bit burst {burst} limit {queue}",),
    "htb": ("qdisc add dev {device} root handle 1: htb default 1 r2q 1000",
            "class add dev {device} parent 1: classid 1:1 htb rate {rate}bit burst {burst} cburst {burst}",
            "qdisc add dev {device} parent 1:1 bfifo limit {queue}"),
}


def run(command: Sequence[str], *, nodes: int, per_node: int, inside: str = "none", between: str = "none",
        env: Mapping[str, str] | None = None, limit_s: float = math.inf) -> int:
    """Run `command` as nodes × per_node ranks over links of these rates.

    Args:
        command: program and arguments.
        nodes: number of emulated nodes.
        per_node: ranks of each.
        inside: rate of a rank's link to its node, such as 900mbit; none: no limit.
        between: rate of its link to all other nodes.
        env: variables beside those of this process.
        limit_s: seconds after which ranks that still run are stopped.

    Returns:
        0, or the exit code of the rank that failed first.
    """
    with Lab(nodes=nodes, per_node=per_node, inside=inside, between=between) as lab:
        return lab.run(command, env, limit_s)


class Lab:
    """The networks of nodes × per_node ranks, from `with Lab(...) as lab` to the end of the block.

    Args:
        nodes: number of emulated nodes.
        per_node: ranks of each.
        inside: rate of the link inside a node, in each direction and per rank, such as 900mbit or 1.5gbit;
            none: as fast as it goes.
        between: the same of the link to other nodes.
    """

    def __init__(self, *, nodes: int, per_node: int, inside: str = "none", between: str = "none") -> None:
        if not (1 <= nodes <= 256 and 1 <= per_node <= 254):
            raise LabError(f"{nodes} nodes of {per_node} ranks cannot be emulated",
                           why="nodes: 1 to 256, ranks per node: 1 to 254", next="--nodes 2 --per-node 2")
        self.nodes, self.per_node, self.world = nodes, per_node, nodes * per_node
        self.rates = {"inside": bits_per_second(inside), "between": bits_per_second(between)}
        self._holders: list[subprocess.Popen] = []       # of the bridges, then of every rank

    def __enter__(self) -> "Lab":
        with ExitStack() as undo:
            undo.callback(self._close)
            self._base = _namespaces_allowed()
            for _ in range(self.world + 1):
                self._hold()
            self._wire()
            self._limit()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def address(self, rank: int) -> str:
        return f"10.77.{rank // self.per_node}.{rank % self.per_node + 1}"

    def environment(self, rank: int) -> dict[str, str]:
        """Variables that torchrun would set for a rank."""
        node, local = divmod(rank, self.per_node)
        return {
            "RANK": str(rank), "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(self.per_node),
            "GROUP_RANK": str(node), "MASTER_ADDR": self.address(0), "MASTER_PORT": str(PORT),
            # Both devices have the rank's one address, and routes choose between them.
            "GLOO_SOCKET_IFNAME": "inside",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def start(self, rank: int, command: Sequence[str], env: Mapping[str, str] | None = None,
              **popen: Any) -> subprocess.Popen:
        """Start a command as one rank; it ends with the lab at the latest.

        Args:
            rank: the rank.
            command: program and arguments; a file `*.py` is run by this Python.
            env: variables beside those of this process.
            **popen: as for subprocess.Popen.
        """
        command = [sys.executable, *command] if command[0].endswith(".py") else list(command)
        # python and moetrain of this environment
        path = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}"
        # c10d warns of every address that has no host name, and here none has.
        variables = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "PATH": path,
                     "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                     **(env or {}), **self.environment(rank)}
        inside = self._inside_of(self._holders[rank + 1])
        return subprocess.Popen([*inside, "sh", "-c", RANK, str(os.getpid()), *command],
                                stdin=subprocess.DEVNULL, env=variables, process_group=0, **popen)

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None,
            limit_s: float = math.inf) -> int:
        """Run a command on every rank. Signals to this process are passed on to the ranks.

        Rank 0 writes to this terminal, the others to stderr behind their number.

        Args:
            command: program and arguments.
            env: variables beside those of this process.
            limit_s: seconds after which the ranks that still run are named and stopped, with exit code 124.

        Returns:
            0, or the exit code of the rank that failed first (128 + signal); the others are then stopped.
        """
        return together(functools.partial(self.start, command=command, env=env), self.world, limit_s)

    def sent(self, rank: int) -> dict[str, int]:
        """Bytes that a rank put on each link so far, with the headers and acknowledgements of TCP."""
        with open(f"/proc/{self._holders[rank + 1].pid}/net/dev") as table:
            rows = dict(line.split(":", 1) for line in table if ":" in line)
        counts = {name.strip(): row.split() for name, row in rows.items()}
        return {link: int(counts[link][8]) for link in LINKS}

    # --- namespaces and cables

    def _hold(self) -> None:
        """Start a process with a new network."""
        before = self._base if not self._holders else [*self._user(), "unshare"]
        holder = subprocess.Popen([*before, "--net", "sh", "-c", HOLDER], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
        self._holders.append(holder)
        with suppress(BrokenPipeError):
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        waiting = select.poll()
        waiting.register(holder.stdout, select.POLLIN)
        answered = waiting.poll(SETUP_S * 1000)
        if not answered or holder.stdout.read(1) != b"\n":          # it speaks from inside
            holder.kill()
            said = holder.stderr.read().decode().strip() if answered else f"no answer within {SETUP_S:g} s"
            raise LabError("a network namespace could not be made", why=said,
                           next="fewer ranks, or look at the limit /proc/sys/user/max_net_namespaces")

    def _user(self) -> list[str]:
        """Words that enter the first holder's user namespace, which owns all networks; none for root."""
        rootless = "--user" in self._base
        if not rootless:
            return []
        return ["nsenter", f"--user=/proc/{self._holders[0].pid}/ns/user", "--preserve-credentials"]

    def _inside_of(self, holder: subprocess.Popen) -> list[str]:
        return [*(self._user() or ["nsenter"]), f"--net=/proc/{holder.pid}/ns/net"]

    def _wire(self) -> None:
        """Make a bridge for each node and one between nodes, and a cable from every rank to its two."""
        switch, *ranks = self._holders
        bridges = [*(f"node{node}" for node in range(self.nodes)), "spine"]
        lines = [f"link add {name} mtu {MTU} type bridge" for name in bridges]
        lines += [f"link set {name} up" for name in bridges]
        for rank, holder in enumerate(ranks):
            for link, bridge in (("inside", f"node{rank // self.per_node}"), ("between", "spine")):
                peer = f"peer name {link} mtu {MTU} netns {holder.pid}"
                lines += [f"link add {link}{rank} mtu {MTU} type veth {peer}",
                          f"link set {link}{rank} master {bridge} up"]
        self._in(switch, "ip", lines)
        for rank, holder in enumerate(ranks):
            own = self.address(rank)
            self._in(holder, "ip", [
                "link set lo up", f"addr add {own}/24 dev inside", f"addr add {own}/32 dev between",
                "link set inside up", "link set between up", f"route add 10.77.0.0/16 dev between src {own}"])

    def _limit(self) -> None:
        """Limit both ends of a cable: the rank's device, and the bridge's port towards it."""
        kinds = list(SHAPERS)
        for rank, holder in enumerate(self._holders[1:]):
            for link, rate in self.rates.items():
                for where, device in ((holder, link), (self._holders[0], f"{link}{rank}")):
                    if rate is not None:
                        kinds = [self._shape(where, device, rate, kinds)]

    def _shape(self, where: subprocess.Popen, device: str, rate: int, kinds: list[str]) -> str:
        """Limit a device by the first of `kinds` that the kernel has, and return that and the rest."""
        burst = max(2 * MTU + 2000, rate // 8 // 1000)   # 1 ms: a busy machine serves the queue late
        queue = max(1024 * 1024, rate // 8 // 20)        # 50 ms
        for kind in kinds:
            lines = [line.format(device=device, rate=rate, burst=burst, queue=queue)
                     for line in SHAPERS[kind]]
            try:
                self._in(where, "tc", lines)
                return kind
            except LabError:
                if kind == kinds[-1]:
                    raise
        raise AssertionError(kinds)

    def _in(self, holder: subprocess.Popen, program: str, lines: list[str]) -> None:
        """Run a batch of commands of ip or tc in a network."""
        done = _done([*self._inside_of(holder), program, "-batch", "-"], "\n".join(lines))
        if done.returncode:
            raise LabError(f"the networks could not be set up: {program} failed",
                           why=" ".join(done.stderr.split()),
                           next="a kernel with CONFIG_VETH, CONFIG_BRIDGE and CONFIG_NET_SCH_TBF or "
                                "CONFIG_NET_SCH_HTB, and root (or CAP_NET_ADMIN and CAP_SYS_ADMIN) or user "
                                "namespaces")

    def _close(self) -> None:
        """End the holders, which kill what runs in the networks."""
        for holder in self._holders:
            with suppress(OSError):
                holder.stdin.close()
        end(self._holders, CLOSE_S)
        for holder in self._holders:
            holder.stdout.close()
            holder.stderr.close()
        self._holders.clear()


def bits_per_second(rate: str) -> int | None:
    """Parse a rate: 900mbit -> 900_000_000; none -> None."""
    if rate == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g|t)bit", rate)
    bits = found and round(float(found[1]) * 1000 ** (" kmgt".index(found[2])))
    if not bits or bits < 100_000:
        raise LabError(f"{rate!r} is not the rate of a link",
                       why="a number and kbit, mbit, gbit or tbit per second, 100kbit or more; or none",
                       next="--inside 900mbit --between 100mbit")
    return bits


def _namespaces_allowed() -> list[str]:
    """Command that makes a first namespace here: as root, or as root of a user namespace of its own."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        packages = " and ".join(sorted({PROGRAMS[name] for name in missing}))
        raise LabError(f"emulated links need {', '.join(missing)}, not found on PATH",
                       why="they make and limit the networks of the ranks",
                       next=f"install {packages} (Linux); ip and tc may be in /usr/sbin")
    tried = []
    for base in (["unshare"], ["unshare", "--user", "--map-root-user"]):
        done = _done([*base, "--net", "true"])
        if done.returncode == 0:
            return base
        tried.append(f"{' '.join(base)} --net: {done.stderr.strip()}")
    raise LabError("emulated links need network namespaces, and this user may not make any",
                   why="; ".join(tried),
                   next="run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, "
                        "user.max_net_namespaces, kernel.apparmor_restrict_unprivileged_userns); "
                        "in a container add CAP_SYS_ADMIN and CAP_NET_ADMIN")


def _done(command: Sequence[str], words: str = "") -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, input=words, capture_output=True, text=True, timeout=SETUP_S)
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(command)} did not end", why=f"it had {SETUP_S:g} s",
                       next="a machine that is less busy") from None


# --- command line


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = _options(argv[:split]), argv[split + 1:]
    if not command and not options.measure:
        raise LabError("nothing to run", why="no command after --",
                       next="-- moetrain train parallel=ep, or --measure")
    with Lab(nodes=options.nodes, per_node=options.per_node, inside=options.inside,
             between=options.between) as lab:
        if options.measure:
            print("\n".join(measure(lab)), flush=True)
        return lab.run(command, limit_s=options.limit) if command else 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.netlab", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="emulated nodes")
    parser.add_argument("--per-node", type=int, default=2, help="ranks of each")
    parser.add_argument("--inside", default="none", metavar="RATE",
                        help="link of a rank to its node, as 900mbit or 1.5gbit; none: no limit")
    parser.add_argument("--between", default="none", metavar="RATE", help="link of a rank to all other nodes")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS",
                        help="ranks that still run then are named and stopped")
    parser.add_argument("--measure", action="store_true",
                        help="print what the links carry and what moving bytes costs the cores")
    return parser.parse_args(argv)

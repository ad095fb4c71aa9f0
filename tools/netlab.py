"""Emulated nodes on one machine: every rank gets a network of its own, with limited links to the others.

    python tools/netlab.py --nodes 2 --per-node 2 --inside 900mbit --between 100mbit -- moetrain train parallel=ep run.steps=20
    python tools/netlab.py --nodes 2 --per-node 2 --inside 900mbit --between 100mbit --measure

A rank has two full-duplex links, as a GPU has in a cluster: `inside` to the ranks of its own emulated node and `between` to all
others. Every rank is a network namespace with one veth device a link, and the routing table picks the device by address:

    rank 10.77.<node>.<1 + rank in node>      device inside  ──rate── bridge of its node ──rate── ranks of that node
                                              device between ──rate── one bridge for all ──rate── every other rank

The rate is set at both ends of the rank's cable (tbf, or htb where the kernel has no tbf), so that what a rank receives is
limited like what it sends. The bridges are as fast as this machine. One device a link, not one device with a class for each
destination: no packet filter is needed, and the kernel counts the bytes of each link (Lab.sent). Rates only: no delay is added.

Nothing has a name outside of the namespaces and nothing holds them but processes that end with this one. So a killed run leaves
nothing behind, labs do not meet, and the bridges are out of reach of the machine's firewall. Needs Linux with veth, bridge and
tbf or htb, and either root or user namespaces. docs/howto/emulated_links.md is the guide.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
LINKS = ("inside", "between")
PORT = 29500                   # free in a new network
MTU = 9000
GRACE_S = 10.0                 # for the other ranks to end on their own after one failed,
TERM_S = 5.0                   # and then after SIGTERM

# tc commands for a device; a queue deep enough that several senders to one rank wait for each other more than they lose packets.
SHAPERS = {
    "tbf": ("qdisc add dev {device} root tbf rate {rate}bit burst {burst} limit {queue}",),
    "htb": ("qdisc add dev {device} root handle 1: htb default 1 r2q 1000",
            "class add dev {device} parent 1: classid 1:1 htb rate {rate}bit burst {burst} cburst {burst}",
            "qdisc add dev {device} parent 1:1 bfifo limit {queue}"),
}


class LabError(Exception):
    """What this machine lacks or the call asks for wrongly; one message for the terminal."""

    def __init__(self, what: str, *, why: str, next: str) -> None:
        super().__init__(f"netlab: {what}\n  why     {why}\n  try     {next}")


def run(command: Sequence[str], *, nodes: int, per_node: int, inside: str = "none", between: str = "none",
        env: Mapping[str, str] | None = None) -> int:
    """Run `command` as nodes × per_node ranks over links of these rates: 0, or the exit code of the rank that failed first."""
    with Lab(nodes=nodes, per_node=per_node, inside=inside, between=between) as lab:
        return lab.run(command, env)


class Lab:
    """The networks of nodes × per_node ranks, from `with Lab(...) as lab` to the end of the block.

    inside, between: a rate in each direction and per rank, as 900mbit or 1.5gbit; none: as fast as it goes.
    """

    def __init__(self, *, nodes: int, per_node: int, inside: str = "none", between: str = "none") -> None:
        if not (1 <= nodes <= 256 and 1 <= per_node <= 254):
            raise LabError(f"{nodes} nodes of {per_node} ranks cannot be emulated", why="nodes: 1 to 256, ranks per node: 1 to 254",
                           next="--nodes 2 --per-node 2")
        self.nodes, self.per_node, self.world = nodes, per_node, nodes * per_node
        self.rates = {"inside": bits_per_second(inside), "between": bits_per_second(between)}
        self._holders: list[subprocess.Popen] = []       # of the bridges, then of every rank

    def __enter__(self) -> "Lab":
        with ExitStack() as undo:
            undo.callback(self._close)
            self._base = _namespaces_allowed()
            for _ in range(self.world + 1):
                self._holders.append(self._hold())
            self._wire()
            self._limit()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def address(self, rank: int) -> str:
        return f"10.77.{rank // self.per_node}.{rank % self.per_node + 1}"

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set for this rank."""
        node, local = divmod(rank, self.per_node)
        return {
            "RANK": str(rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(self.per_node),
            "GROUP_RANK": str(node), "MASTER_ADDR": self.address(0), "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "inside",              # both devices have the rank's one address; routes choose between them
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }

    def start(self, rank: int, command: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any) -> subprocess.Popen:
        """`command` as this rank; it is killed when the thread that called here ends. **popen: as for subprocess.Popen."""
        command = [sys.executable, *command] if command[0].endswith(".py") else list(command)
        path = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}"      # python and moetrain of this environment
        variables = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, **(env or {}), **self.environment(rank)}
        return subprocess.Popen([*self._inside_of(self._holders[rank + 1]), "setpriv", "--pdeathsig", "KILL", *command],
                                stdin=subprocess.DEVNULL, env=variables, process_group=0, **popen)

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        """`command` on every rank: 0, or the exit code of the rank that failed first (128 + signal); the others are then stopped.

        Rank 0 writes to this terminal, the others to stderr behind their number. Signals to this process are passed on.
        """
        ranks: list[subprocess.Popen] = []
        readers = []
        with _forwarding(ranks):
            try:
                for rank in range(self.world):
                    own = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"} if rank else {}
                    ranks.append(self.start(rank, command, env, **own))
                    if rank:
                        readers.append(threading.Thread(target=_show, args=(rank, ranks[rank]), daemon=True))
                        readers[-1].start()
                failed = _first_failure(ranks)
            finally:
                _stop(ranks)
                for reader in readers:
                    reader.join(1)
        if failed is None:
            return 0
        code = ranks[failed].returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        print(f"netlab: rank {failed} {how}", file=sys.stderr)
        return 128 - code if code < 0 else code

    def sent(self, rank: int) -> dict[str, int]:
        """Bytes that this rank put on each link so far, with the headers and acknowledgements of TCP."""
        with open(f"/proc/{self._holders[rank + 1].pid}/net/dev") as table:
            rows = dict(line.split(":", 1) for line in table if ":" in line)
        counts = {name.strip(): row.split() for name, row in rows.items()}
        return {link: int(counts[link][8]) for link in LINKS}

    # --- namespaces and cables

    def _hold(self) -> subprocess.Popen:
        """A process with a new network, until our end of its input closes: at the latest when we are gone."""
        before = self._base if not self._holders else [*self._user(), "unshare"]
        holder = subprocess.Popen([*before, "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  process_group=0)
        with suppress(BrokenPipeError):
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        if holder.stdout.read(1) != b"\n":               # cat answers from inside
            raise LabError("a network namespace could not be made", why=holder.stderr.read().decode().strip(),
                           next="fewer ranks, or look at the limit /proc/sys/user/max_net_namespaces")
        return holder

    def _user(self) -> list[str]:
        """Where user namespaces stand in for root, all networks belong to the first holder's."""
        rootless = "--user" in self._base
        return ["nsenter", f"--user=/proc/{self._holders[0].pid}/ns/user", "--preserve-credentials"] if rootless else []

    def _inside_of(self, holder: subprocess.Popen) -> list[str]:
        return [*(self._user() or ["nsenter"]), f"--net=/proc/{holder.pid}/ns/net"]

    def _wire(self) -> None:
        """A bridge for each node and one between nodes, and a cable from every rank to its two."""
        switch, *ranks = self._holders
        bridges = [*(f"node{node}" for node in range(self.nodes)), "spine"]
        lines = [f"link add {name} mtu {MTU} type bridge" for name in bridges] + [f"link set {name} up" for name in bridges]
        for rank, holder in enumerate(ranks):
            for link, bridge in (("inside", f"node{rank // self.per_node}"), ("between", "spine")):
                lines += [f"link add {link}{rank} mtu {MTU} type veth peer name {link} mtu {MTU} netns {holder.pid}",
                          f"link set {link}{rank} master {bridge} up"]
        self._in(switch, "ip", lines)
        for rank, holder in enumerate(ranks):
            own = self.address(rank)
            self._in(holder, "ip", ["link set lo up", f"addr add {own}/24 dev inside", f"addr add {own}/32 dev between",
                                    "link set inside up", "link set between up", f"route add 10.77.0.0/16 dev between src {own}"])

    def _limit(self) -> None:
        """Both ends of a cable: what leaves the rank's device, and what leaves the bridge's port towards it."""
        kinds = list(SHAPERS)
        for rank, holder in enumerate(self._holders[1:]):
            for link, rate in self.rates.items():
                for where, device in ((holder, link), (self._holders[0], f"{link}{rank}")):
                    if rate is not None:
                        kinds = [self._shape(where, device, rate, kinds)]

    def _shape(self, where: subprocess.Popen, device: str, rate: int, kinds: list[str]) -> str:
        """The first of `kinds` that the kernel has limits this device; returns it."""
        burst = max(MTU + 1000, 64 * 1024, rate // 8 // 500)         # 2 ms: a busy machine serves the queue late
        queue = max(1024 * 1024, rate // 8 // 20)                    # 50 ms
        for kind in kinds:
            lines = [line.format(device=device, rate=rate, burst=burst, queue=queue) for line in SHAPERS[kind]]
            try:
                self._in(where, "tc", lines)
                return kind
            except LabError:
                if kind == kinds[-1]:
                    raise
        raise AssertionError(kinds)

    def _in(self, holder: subprocess.Popen, program: str, lines: list[str]) -> None:
        done = subprocess.run([*self._inside_of(holder), program, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"the networks could not be set up: {program} failed", why=" ".join(done.stderr.split()),
                           next="a kernel with CONFIG_VETH, CONFIG_BRIDGE and CONFIG_NET_SCH_TBF or CONFIG_NET_SCH_HTB, "
                                "and root (or CAP_NET_ADMIN and CAP_SYS_ADMIN) or user namespaces")

    def _close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.communicate()
        self._holders.clear()


def bits_per_second(rate: str) -> int | None:
    """900mbit -> 900_000_000; none -> None."""
    if rate == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g|t)bit", rate)
    bits = found and round(float(found[1]) * 1000 ** (" kmgt".index(found[2])))
    if not bits or bits < 100_000:
        raise LabError(f"{rate!r} is not the rate of a link", why="a number and kbit, mbit, gbit or tbit per second, 100kbit or more; or none",
                       next="--inside 900mbit --between 100mbit")
    return bits


def _namespaces_allowed() -> list[str]:
    """How a first namespace is made here: as root, or as root of a user namespace of our own."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        raise LabError(f"emulated links need {', '.join(missing)}, not found on PATH", why="they make and limit the networks of the ranks",
                       next=f"install {' and '.join(sorted({PROGRAMS[name] for name in missing}))} (Linux); ip and tc may be in /usr/sbin")
    tried = []
    for base in (["unshare"], ["unshare", "--user", "--map-root-user"]):
        done = subprocess.run([*base, "--net", "true"], capture_output=True, text=True)
        if done.returncode == 0:
            return base
        tried.append(f"{' '.join(base)} --net: {done.stderr.strip()}")
    raise LabError("emulated links need network namespaces, and this user may not make any", why="; ".join(tried),
                   next="run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_net_namespaces, "
                        "kernel.apparmor_restrict_unprivileged_userns); in a container add CAP_SYS_ADMIN and CAP_NET_ADMIN")


# --- ranks


@contextmanager
def _forwarding(ranks: list[subprocess.Popen]) -> Iterator[None]:
    """Signals to us go to the ranks, which end or save in their own way; we end after them."""
    def pass_on(number: int, frame: object) -> None:
        for rank in ranks:
            _signal(rank, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(ranks: list[subprocess.Popen]) -> int | None:
    """Waits for all ranks, after a failure GRACE_S at most: the rank that failed first, or None."""
    failed, deadline, running = None, float("inf"), set(range(len(ranks)))
    while running and time.monotonic() < deadline:
        for rank in sorted(running):
            code = ranks[rank].poll()
            if code is not None:
                running.discard(rank)
                if code and failed is None:
                    failed, deadline = rank, time.monotonic() + GRACE_S
        time.sleep(0.02)
    return failed


def _stop(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        _signal(rank, signal.SIGTERM)
    deadline = time.monotonic() + TERM_S
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        _signal(rank, signal.SIGKILL)
        rank.wait()


def _signal(rank: subprocess.Popen, number: int) -> None:
    """To a rank that still runs, with its children."""
    if rank.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, number)


def _show(rank: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stderr.write(f"[rank {rank}] {line}")


# --- what the links carry, and what that costs


def measure(lab: Lab, seconds: float = 2.0) -> list[str]:
    """Lines of a table: the rates of one TCP stream, and the time of a matrix product alone and while bytes move."""
    pairs = {"inside": (0, 1), "between": (0, lab.per_node)}
    pairs = {link: pair for link, pair in pairs.items() if (lab.per_node if link == "inside" else lab.nodes) > 1}
    lines = [f"emulated links, {lab.nodes} nodes x {lab.per_node} ranks; rates per rank and direction, one TCP stream"]
    for link, (source, target) in pairs.items():
        measured = _transfer(lab, source, target, seconds)()
        asked = lab.rates[link]
        share = f"asked {asked / 1e6:.0f}, {measured / asked:.0%} of it" if asked else "no limit asked"
        lines.append(f"  {link:8} rank {source} -> {target}   {measured / 1e6:8.1f} mbit/s   ({share})")
    alone = _products(lab, (0,), seconds)
    lines += [f"a 512 x 512 float32 matrix product, one thread ({len(os.sched_getaffinity(0))} cores in all)",
              f"  one rank, nothing moves              {alone:7.2f} ms"]
    for link, pair in pairs.items():
        both = _products(lab, pair, seconds)
        moving = [_transfer(lab, *direction, 2 * seconds) for direction in (pair, pair[::-1])]
        busy = _products(lab, pair, seconds)
        rates = " and ".join(f"{wait() / 1e6:.0f}" for wait in moving)
        lines += [f"  ranks {pair[0]} and {pair[1]}, nothing moves          {both:7.2f} ms   {both / alone:.2f} x",
                  f"  both, and {link:7} both ways         {busy:7.2f} ms   {busy / both:.2f} x that   (moved {rates} mbit/s)"]
    return lines


def _transfer(lab: Lab, source: int, target: int, seconds: float):
    """Starts a stream from one rank to another; the function returned waits for it and gives bits per second."""
    port = str(PORT + 1 + source)
    receiver = lab.start(target, [__file__, "receive", port], stdout=subprocess.PIPE, text=True)
    sender = lab.start(source, [__file__, "send", lab.address(target), port, str(seconds)])

    def wait() -> float:
        text, _ = receiver.communicate()
        if sender.wait() or receiver.returncode:
            raise LabError(f"no stream from rank {source} to {target}", why="see above", next="look at the devices with nsenter and ip")
        return float(text)

    return wait


def _products(lab: Lab, ranks: Sequence[int], seconds: float) -> float:
    """Milliseconds of a product, the mean over ranks that compute at the same time."""
    started = [lab.start(rank, [__file__, "multiply", str(seconds)], stdout=subprocess.PIPE, text=True) for rank in ranks]
    return statistics.mean(float(process.communicate()[0]) for process in started)


def _receive(port: str) -> None:
    with socket.create_server(("", int(port))) as server, server.accept()[0] as stream:
        buffer, total, began = memoryview(bytearray(1 << 20)), 0, None
        while count := stream.recv_into(buffer):
            now = time.monotonic()
            began = began or now + 0.2                   # after the first burst, and TCP's slow start
            total += count if now > began else 0
        print(total * 8 / (now - began))


def _send(host: str, port: str, seconds: str) -> None:
    deadline, data = time.monotonic() + 10, bytes(1 << 20)
    while True:
        try:
            stream = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:                   # it is starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    with stream:
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            stream.sendall(data[:1 << 16])


def _multiply(seconds: str) -> None:
    import numpy

    matrix, times, end = numpy.ones((512, 512), numpy.float32), [], time.monotonic() + float(seconds)
    while time.monotonic() < end:
        began = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - began)
    print(statistics.mean(times) * 1000)


# --- command line


def main(argv: list[str]) -> int:
    roles = {"receive": _receive, "send": _send, "multiply": _multiply}      # of --measure, in the network of a rank
    if argv and argv[0] in roles:
        roles[argv[0]](*argv[1:])
        return 0
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = _options(argv[:split]), argv[split + 1:]
    if not command and not options.measure:
        _usage("nothing to run", why="no command after --", next="-- moetrain train parallel=ep, or --measure")
    with Lab(nodes=options.nodes, per_node=options.per_node, inside=options.inside, between=options.between) as lab:
        if options.measure:
            print("\n".join(measure(lab)), flush=True)
        return lab.run(command) if command else 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="netlab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="emulated nodes")
    parser.add_argument("--per-node", type=int, default=2, help="ranks of each")
    parser.add_argument("--inside", default="none", metavar="RATE", help="link of a rank to its node, as 900mbit or 1.5gbit; none: no limit")
    parser.add_argument("--between", default="none", metavar="RATE", help="link of a rank to all other nodes")
    parser.add_argument("--measure", action="store_true", help="print what the links carry and what moving bytes costs the cores")
    return parser.parse_args(argv)


def _usage(what: str, **parts: str) -> NoReturn:
    raise LabError(what, **parts)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

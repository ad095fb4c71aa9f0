"""Measure the links of a lab, and what moving bytes costs the cores: `python -m tools.netlab --measure`.

Senders, receivers and matrix products are processes of this file, in the networks of ranks.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tools.netlab.processes import LabError

PORT = 29600                   # and those above it, one for each sender; not the port of a rendezvous
START_S = 60.0                 # for Python to start, and for the other end of a stream to be there


class Lab(Protocol):
    """Part of the lab (tools/netlab/lab.py) that a measurement needs."""

    nodes: int
    per_node: int
    rates: dict[str, int | None]

    def address(self, rank: int) -> str: ...

    def start(self, rank: int, command: Sequence[str], **popen: Any) -> subprocess.Popen: ...


def measure(lab: Lab, seconds: float = 2.0) -> list[str]:
    """Table of the rate of a TCP stream, and the time of a matrix product alone and while bytes move."""
    pairs = {"inside": (0, 1), "between": (0, lab.per_node)}
    pairs = {link: pair for link, pair in pairs.items()
             if (lab.per_node if link == "inside" else lab.nodes) > 1}
    lines = [f"emulated links, {lab.nodes} nodes x {lab.per_node} ranks; "
             "rates per rank and direction, one TCP stream"]
    for link, (source, target) in pairs.items():
        measured = transfer(lab, source, target, seconds)()
        asked = lab.rates[link]
        share = f"asked {asked / 1e6:.0f}, {measured / asked:.0%} of it" if asked else "no limit asked"
        lines.append(f"  {link:8} rank {source} -> {target}   {measured / 1e6:8.1f} mbit/s   ({share})")
    alone = _products(lab, (0,), seconds)
    lines += [f"a 512 x 512 float32 matrix product, one thread ({len(os.sched_getaffinity(0))} cores in all)",
              f"  one rank, nothing moves              {alone:7.2f} ms"]
    for link, pair in pairs.items():
        both = _products(lab, pair, seconds)
        moving = [transfer(lab, *direction, 2 * seconds) for direction in (pair, pair[::-1])]
        busy = _products(lab, pair, seconds)
        rates = " and ".join(f"{wait() / 1e6:.0f}" for wait in moving)
        lines += [f"  ranks {pair[0]} and {pair[1]}, nothing moves         {both:7.2f} ms   "
                  f"{both / alone:.2f} x",
                  f"  both, and {link:7} both ways          {busy:7.2f} ms   "
                  f"{busy / both:.2f} x that   (moved {rates} mbit/s)"]
    return lines


def transfer(lab: Lab, source: int, target: int, seconds: float) -> Callable[[], float]:
    """Start a stream from one rank to another.

    Args:
        lab: the lab.
        source: rank that sends.
        target: rank that receives.
        seconds: length of the stream.

    Returns:
        A function that waits for the end of the stream and returns bits per second.
    """
    port = str(PORT + source)
    receiver = _start(lab, target, "receive", port, START_S)
    sender = _start(lab, source, "send", lab.address(target), port, seconds, START_S)

    def wait() -> float:
        _answer(sender, f"rank {source}, which sends to rank {target},", seconds)
        return float(_answer(receiver, f"rank {target}, which receives from rank {source},", seconds))

    return wait


def _products(lab: Lab, ranks: Sequence[int], seconds: float) -> float:
    """Milliseconds of a matrix product, the mean over ranks that compute at the same time."""
    started = [_start(lab, rank, "multiply", seconds) for rank in ranks]
    return statistics.mean(float(_answer(process, f"rank {rank}", seconds))
                           for rank, process in zip(ranks, started))


def _start(lab: Lab, rank: int, *words: object) -> subprocess.Popen:
    """Start a part of this file in the network of a rank."""
    command = [sys.executable, "-m", "tools.netlab.measure", *map(str, words)]
    return lab.start(rank, command, stdout=subprocess.PIPE, text=True)


def _answer(process: subprocess.Popen, who: str, seconds: float) -> str:
    """Output of a process. The rest of a failed measurement ends with the lab."""
    try:
        text, _ = process.communicate(timeout=seconds + 2 * START_S)
    except subprocess.TimeoutExpired:
        raise LabError(f"{who} did not end", why=f"it had {seconds + 2 * START_S:g} s",
                       next="a machine that is less busy") from None
    if process.returncode:
        raise LabError(f"{who} failed", why="see above", next="look at the devices with nsenter and ip")
    return text


def _receive(port: str, within_s: str) -> None:
    """Print the rate of a stream in bits per second. Silence of `within_s` ends it."""
    with socket.create_server(("", int(port))) as server:
        server.settimeout(float(within_s))
        stream, _ = server.accept()
    with stream:
        stream.settimeout(float(within_s))
        buffer, total, began = memoryview(bytearray(1 << 20)), 0, None
        while count := stream.recv_into(buffer):
            now = time.monotonic()
            began = began or now + 0.2                   # leaves out the first burst and TCP's slow start
            total += count if now > began else 0
        print(total * 8 / (now - began))


def _send(host: str, port: str, seconds: str, within_s: str) -> None:
    deadline, data = time.monotonic() + float(within_s), bytes(1 << 16)
    while True:
        try:
            stream = socket.create_connection((host, int(port)), timeout=float(within_s))
            break
        except ConnectionRefusedError:                   # it is starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    with stream:
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            stream.sendall(data)


def _multiply(seconds: str) -> None:
    import numpy

    matrix, times, end = numpy.ones((512, 512), numpy.float32), [], time.monotonic() + float(seconds)
    while time.monotonic() < end:
        began = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - began)
    print(statistics.mean(times) * 1000)


if __name__ == "__main__":
    {"receive": _receive, "send": _send, "multiply": _multiply}[sys.argv[1]](*sys.argv[2:])

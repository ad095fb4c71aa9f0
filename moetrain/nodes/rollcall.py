"""The nodes of a run find each other before anything is started.

Node 0 listens at HEAD:PORT, each other node connects and says who it is and how many nodes and ranks it was told of; when
all are there, and agree, everybody goes on to torchrun, which takes the port over. Where one is missing or contradicts,
every node says so and leaves, within the time limit. (torchrun itself waits for minutes, accepts nodes that were told
different numbers, and names nobody.)

    one line of JSON to node 0      {"moetrain": 1, "node": 1, "nodes": 2, "nproc": 4}
    one line of JSON back           {"go": true}, or {"error": {"number": 5, "what": ..., ...}}
"""

import errno
import fcntl
import json
import select
import socket
import struct
import time
from contextlib import ExitStack, suppress

from moetrain.errors import RendezvousError
from moetrain.nodes.node import Node

_PROTOCOL = 1
_LONGEST = 1000            # bytes of one line
_RETRY_S = 0.2
_SIOCGIFADDR = 0x8915      # Linux: IPv4 address of a network interface


def own_address(node: Node) -> str:
    """The address of this node that the others reach it at: on the head HEAD itself, elsewhere that of the route to it."""
    if node.rank == 0:
        return node.head
    return _source(node) or socket.gethostname()


def interface(node: Node) -> str | None:
    """The network interface of the route to the other nodes; None where it cannot be told (IPv6, not Linux)."""
    address = _source(node)
    if address is None or node.nodes > 1 and address.startswith("127."):   # the head may know its own name as loopback
        return None
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            asked = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(asked[20:24]) == address:
                return name
    return None


def roll_call(node: Node) -> None:
    """Wait until all nodes are there. Raises RendezvousError on every node that can be told."""
    if node.nodes == 1:
        return
    deadline = time.monotonic() + node.timeout_s
    if node.rank == 0:
        _gather(node, deadline)
    else:
        _answer(node, deadline)


def unreachable(where: str, why: str) -> RendezvousError:
    return RendezvousError(2, "the rendezvous at node 0 cannot be reached", where=where, why=why,
                           next="check that node 0 was started, HEAD and PORT, and that no firewall is between the nodes")


# --- node 0


def _gather(node: Node, deadline: float) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(_listen(node))
        present: dict[int, socket.socket] = {}
        try:
            while len(present) < node.nodes - 1:
                if not select.select([server], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise _missing(node, present)
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                told = _read(connection) or {}
                if told.get("moetrain") != _PROTOCOL or type(told.get("node")) is not int:
                    continue                             # not one of ours: a probe, or a port scan
                present = {rank: other for rank, other in present.items() if _connected(other)}
                number = told.get("node")
                theirs = told.get("nodes"), told.get("nproc")
                if theirs != (node.nodes, node.nproc) or number in present or number not in range(1, node.nodes):
                    present[len(present) + node.nodes] = connection          # it is told, too
                    raise _contradiction(node, number, theirs)
                present[number] = connection
        except RendezvousError as error:
            parts = {name: getattr(error, name) for name in ("what", "where", "why", "next")}
            parts["number"] = int(error.id[-3:])
            for connection in present.values():
                _write(connection, {"error": parts})
            raise
        for connection in present.values():
            _write(connection, {"go": True})


def _listen(node: Node) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(("", node.port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=512)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise RendezvousError(
            3, f"port {node.port} of node 0 is taken" if taken else f"port {node.port} of node 0 cannot be used",
            where=f"{node.head}:{node.port}", why="another run or program listens there" if taken else str(error),
            next="PORT=<another port>, the same on every node") from error


def _missing(node: Node, present: dict[int, socket.socket]) -> RendezvousError:
    missing = [str(rank) for rank in range(1, node.nodes) if rank not in present]
    names = f"node {missing[0]}" if len(missing) == 1 else f"nodes {', '.join(missing)}"
    return RendezvousError(
        4, f"{names} of {node.nodes} did not come", where=f"{node.head}:{node.port}",
        why=f"node 0 waited {node.timeout_s} s (RDZV_TIMEOUT)",
        next="start every node, with NODE_RANK from 1 and the same HEAD and PORT; RDZV_TIMEOUT=<seconds> waits longer")


def _contradiction(node: Node, number: int, theirs: tuple[object, object]) -> RendezvousError:
    if theirs == (node.nodes, node.nproc):
        known = number in range(1, node.nodes)
        why = f"two nodes were started as NODE_RANK={number}" if known else f"there is no node {number}"
        advice = "a NODE_RANK of its own for every node"
    else:
        why = f"node 0 was told NODES={node.nodes} NPROC={node.nproc}, node {number} NODES={theirs[0]} NPROC={theirs[1]}"
        advice = "the same NODES and NPROC on every node"
    return RendezvousError(5, "the nodes contradict each other", where=f"{node.head}:{node.port}", why=why, next=advice)


# --- the other nodes


def _answer(node: Node, deadline: float) -> None:
    """Say who this is, and wait for node 0's word."""
    where = f"{node.head}:{node.port}"
    reason = "nothing answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((node.head, node.port), timeout=min(left, 10)) as connection:
                _write(connection, {"moetrain": _PROTOCOL, "node": node.rank, "nodes": node.nodes, "nproc": node.nproc})
                connection.settimeout(node.timeout_s + 5)    # node 0 may have started later, and waits as long
                said = _read(connection)
        except OSError as error:
            reason = str(error)
        else:
            if said and said.get("go"):
                return
            if said and isinstance(said.get("error"), dict):
                raise _told(**said["error"])
            reason = "something answers, but it is not moetrain, or it has ended"
        time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
    raise unreachable(where, f"{reason}; tried for {node.timeout_s} s (RDZV_TIMEOUT)")


def _told(number: int, what: str, where: str, why: str, next: str) -> RendezvousError:
    """The error of node 0, here."""
    return RendezvousError(number, what, where=where, why=why, next=next)


def _source(node: Node) -> str | None:
    """Own address of the route to the head. No packet is sent: connecting a datagram socket only chooses a route."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(node.head, node.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return None


# --- lines


def _write(connection: socket.socket, message: dict) -> None:
    with suppress(OSError):                              # who has left needs no answer
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> dict | None:
    """One line; None when it is not one of ours."""
    received = b""
    with suppress(OSError, ValueError):
        while not received.endswith(b"\n") and len(received) < _LONGEST and (more := connection.recv(_LONGEST)):
            received += more
        message = json.loads(received)
        return message if isinstance(message, dict) else None
    return None


def _connected(connection: socket.socket) -> bool:
    """False once the other side has left: a node that was started again comes twice."""
    return not select.select([connection], [], [], 0)[0]

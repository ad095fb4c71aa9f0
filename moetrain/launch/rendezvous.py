"""Rendezvous of the nodes of a run, before any rank starts.

Node 0 listens at HEAD:PORT. Each other node connects and announces its number, and the NODES and NPROC that
it was started with. When all are there and agree, each node starts torchrun, which takes the port over. Where
a node is missing or contradicts the others, every node prints that and exits within the time limit.
torchrun's own rendezvous waits for minutes, accepts nodes that were started with different numbers, and names
no node.

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
from moetrain.files import parse_json
from moetrain.launch.node import Node

_PROTOCOL = 1
_MAX_LINE = 2000           # bytes of one line
_MAX_UNIDENTIFIED = 256    # open connections that have not announced their node
_PARTS = ("what", "where", "why", "next")
_RETRY_S = 0.2
_WRITE_S = 5.0             # time limit of sending one line
_SIOCGIFADDR = 0x8915      # Linux: IPv4 address of a network interface


def own_address(node: Node) -> str:
    """Address at which the other nodes reach this one.

    On the head it is HEAD itself, elsewhere the local address of the route to the head.
    """
    if node.rank == 0:
        return node.head
    return _local_address(node) or socket.gethostname()


def interface(node: Node) -> str | None:
    """Network interface of the route to the other nodes; None where it is unknown (IPv6, not Linux)."""
    address = _local_address(node)
    # On the head its own name may resolve to the loopback address.
    if address is None or node.nodes > 1 and address.startswith("127."):
        return None
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            asked = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(asked[20:24]) == address:
                return name
    return None


def wait_for_nodes(node: Node) -> None:
    """Wait until all nodes are there and agree. Raises RendezvousError on every node that can be reached."""
    if node.nodes == 1:
        return
    deadline = time.monotonic() + node.timeout_s
    if node.rank == 0:
        _collect_nodes(node, deadline)
    else:
        _report_to_head(node, deadline)


def unreachable(where: str, why: str) -> RendezvousError:
    """Return the error of a node that cannot reach node 0."""
    return RendezvousError(
        2, "the rendezvous at node 0 cannot be reached", where=where, why=why,
        next="check that node 0 was started, HEAD and PORT, and that no firewall is between the nodes")


# --- node 0


def _collect_nodes(node: Node, deadline: float) -> None:
    """Collect the announcements of all nodes, and answer them.

    All connections are read together, so one that sends nothing, or a byte a second, delays no other.
    """
    present: dict[int, socket.socket] = {}
    # Connections that have not announced their node yet, oldest first, and the bytes received from each.
    unidentified: dict[socket.socket, bytes] = {}
    with ExitStack() as stack:
        server = stack.enter_context(_listen(node))
        try:
            while len(present) < node.nodes - 1:
                ready = select.select(
                    [server, *unidentified], [], [], max(0.0, deadline - time.monotonic()))[0]
                if not ready:
                    raise _missing(node, present)
                for connection in ready:
                    if connection is not server:
                        _read_announcement(node, connection, unidentified, present)
                    elif accepted := _accept(server):
                        unidentified[stack.enter_context(accepted)] = b""
                        if len(unidentified) > _MAX_UNIDENTIFIED:
                            _drop(next(iter(unidentified)), unidentified)
        except RendezvousError as error:
            parts = {name: getattr(error, name) for name in _PARTS} | {"number": int(error.id[-3:])}
            for connection in present.values():
                _write(connection, {"error": parts})
            raise
        for connection in present.values():
            _write(connection, {"go": True})


def _accept(server: socket.socket) -> socket.socket | None:
    with suppress(OSError):  # the other side has closed it already
        connection = server.accept()[0]
        connection.settimeout(_WRITE_S)
        return connection
    return None


def _drop(connection: socket.socket, unidentified: dict[socket.socket, bytes]) -> None:
    del unidentified[connection]
    connection.close()


def _read_announcement(node: Node, connection: socket.socket, unidentified: dict[socket.socket, bytes],
                       present: dict[int, socket.socket]) -> None:
    """Read from a connection; once its announcement is complete, move it to `present`.

    Raises RendezvousError where the announcement contradicts this node. A connection that is not a node of
    moetrain, such as a probe or a port scan, is closed.
    """
    try:
        more = connection.recv(_MAX_LINE)
    except OSError:
        more = b""
    unidentified[connection] += more
    if more and not unidentified[connection].endswith(b"\n") and len(unidentified[connection]) < _MAX_LINE:
        return
    announced = _parsed(unidentified[connection]) or {}
    number, announced_sizes = announced.get("node"), (announced.get("nodes"), announced.get("nproc"))
    if (announced.get("moetrain") != _PROTOCOL or type(number) is not int
            or not all(type(value) is int for value in announced_sizes)):
        _drop(connection, unidentified)
        return
    del unidentified[connection]
    for rank in [rank for rank, other in present.items() if not _is_connected(other)]:
        del present[rank]
    if announced_sizes != (node.nodes, node.nproc) or number in present or number not in range(1, node.nodes):
        present[len(present) + node.nodes] = connection  # so that it is sent the error, too
        raise _contradiction(node, number, announced_sizes)
    present[number] = connection


def _listen(node: Node) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(
            ("", node.port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=512)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise RendezvousError(
            3,
            f"port {node.port} of node 0 is taken" if taken else f"port {node.port} of node 0 cannot be used",
            where=f"{node.head}:{node.port}",
            why="another run or program listens there" if taken else str(error),
            next="PORT=<another port>, the same on every node") from error


def _missing(node: Node, present: dict[int, socket.socket]) -> RendezvousError:
    missing = [str(rank) for rank in range(1, node.nodes) if rank not in present]
    names = f"node {missing[0]}" if len(missing) == 1 else f"nodes {', '.join(missing)}"
    return RendezvousError(
        4, f"{names} of {node.nodes} did not come", where=f"{node.head}:{node.port}",
        why=f"node 0 waited {node.timeout_s} s (RDZV_TIMEOUT)",
        next="start every node, with NODE_RANK from 1 and the same HEAD and PORT; "
             "RDZV_TIMEOUT=<seconds> waits longer")


def _contradiction(node: Node, number: int, announced_sizes: tuple[object, object]) -> RendezvousError:
    if announced_sizes == (node.nodes, node.nproc):
        known = number in range(1, node.nodes)
        why = f"two nodes were started as NODE_RANK={number}" if known else f"there is no node {number}"
        advice = "a NODE_RANK of its own for every node"
    else:
        why = (f"node 0 was told NODES={node.nodes} NPROC={node.nproc}, "
               f"node {number} NODES={announced_sizes[0]} NPROC={announced_sizes[1]}")
        advice = "the same NODES and NPROC on every node"
    return RendezvousError(5, "the nodes contradict each other", where=f"{node.head}:{node.port}", why=why,
                           next=advice)


# --- the other nodes


def _report_to_head(node: Node, deadline: float) -> None:
    """Announce this node to node 0 and wait for the answer, again until the deadline."""
    where = f"{node.head}:{node.port}"
    reason = "nothing answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((node.head, node.port), timeout=min(left, 10)) as connection:
                _write(connection, {"moetrain": _PROTOCOL, "node": node.rank, "nodes": node.nodes,
                                    "nproc": node.nproc})
                # Node 0 may have started later, and then waits as long again for the others.
                said = _read(connection, time.monotonic() + node.timeout_s + _WRITE_S)
        except OSError as error:
            reason = str(error)
        else:
            if said and said.get("go"):
                return
            if said and (refused := _error_from_head(said.get("error"))):
                raise refused
            reason = "something answers, but it is not moetrain, or it has ended"
        time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
    raise unreachable(where, f"{reason}; tried for {node.timeout_s} s (RDZV_TIMEOUT)")


def _error_from_head(parts: object) -> RendezvousError | None:
    """The error that node 0 sent, to be raised here; None where the message is not an error."""
    if not isinstance(parts, dict) or type(number := parts.get("number")) is not int or not 0 < number < 1000:
        return None
    if not all(isinstance(parts.get(name), str) for name in _PARTS):
        return None
    return _rebuilt_error(**{name: parts[name] for name in ("number", *_PARTS)})


def _rebuilt_error(number: int, what: str, where: str, why: str, next: str) -> RendezvousError:
    return RendezvousError(number, what, where=where, why=why, next=next)


def _local_address(node: Node) -> str | None:
    """Local address of the route to the head.

    No packet is sent: connecting a datagram socket only chooses a route.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(node.head, node.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return None


# --- lines


def _write(connection: socket.socket, message: dict) -> None:
    with suppress(OSError):  # a node that has left needs no answer
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, deadline: float) -> dict | None:
    """Read one line that arrives before the deadline; None where none does, or it is not a JSON object."""
    received = b""
    with suppress(OSError):
        while (not received.endswith(b"\n") and len(received) < _MAX_LINE
               and (left := deadline - time.monotonic()) > 0):
            connection.settimeout(left)
            if not (more := connection.recv(_MAX_LINE)):
                break
            received += more
    return _parsed(received)


def _parsed(line: bytes) -> dict | None:
    with suppress(ValueError):
        message = parse_json(line, depth=2)
        return message if isinstance(message, dict) else None
    return None


def _is_connected(connection: socket.socket) -> bool:
    """Whether the other side is still there. A node that was started again has left its first connection."""
    return not select.select([connection], [], [], 0)[0]

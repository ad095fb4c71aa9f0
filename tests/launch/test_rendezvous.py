"""The nodes find each other, or say who is missing: real sockets, a thread for each node."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from moetrain.errors import RendezvousError
from moetrain.launch.node import Node
from moetrain.launch.rendezvous import interface, own_address, wait_for_nodes
from tests.support.ranks import free_port


def node(rank: int, nodes: int = 3, **changes: object) -> Node:
    place = Node(nodes=nodes, rank=rank, head="127.0.0.1", port=29400, nproc=2, restarts=0, timeout_s=10)
    return dataclasses.replace(place, **changes)


def call(*nodes: Node, port: int | None = None) -> list[RendezvousError | None]:
    """How the roll call ended on each node: None when all were there."""
    port = port or free_port()

    def one(place: Node) -> RendezvousError | None:
        try:
            wait_for_nodes(dataclasses.replace(place, port=port))
        except RendezvousError as error:
            return error
        return None

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(one, nodes))


def test_all_nodes_go_on_in_whatever_order_they_come() -> None:
    assert call(node(2), node(1), node(0)) == [None] * 3
    assert call(node(0, nodes=1)) == [None]


def test_the_port_is_free_for_torchrun_afterwards() -> None:
    port = free_port()
    for _ in range(2):                                   # and a requeued run calls again at once
        assert call(node(0, nodes=2), node(1, nodes=2), port=port) == [None, None]
    with socket.create_server(("", port)):
        pass


def test_a_missing_node_is_named_everywhere() -> None:
    errors = call(node(0, nodes=4, timeout_s=1), node(2, nodes=4, timeout_s=1))
    assert [error.id for error in errors] == ["E-RENDEZVOUS-004"] * 2
    assert "nodes 1, 3 of 4" in str(errors[0]) and "nodes 1, 3 of 4" in str(errors[1])


@pytest.mark.parametrize("other, said", [
    (node(1, nodes=3), "NODES=3"), (node(1, nodes=2, nproc=4), "NPROC=4"),
    (node(2, nodes=2), "there is no node 2")])
def test_a_contradiction_is_named_everywhere(other: Node, said: str) -> None:
    errors = call(node(0, nodes=2), other)
    assert [error.id for error in errors] == ["E-RENDEZVOUS-005"] * 2
    assert all(said in str(error) for error in errors)


def test_two_nodes_of_one_number() -> None:
    errors = call(node(0, timeout_s=5), node(1, timeout_s=5), node(1, timeout_s=5))
    assert [error.id for error in errors] == ["E-RENDEZVOUS-005"] * 3 and "NODE_RANK=1" in str(errors[0])


def test_a_node_that_was_started_again_counts_once() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        head = pool.submit(call, node(0, nodes=3), port=port)
        while True:
            try:
                gone = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                time.sleep(0.02)
        gone.sendall(b'{"moetrain": 1, "node": 1, "nodes": 3, "nproc": 2}\n')
        gone.close()
        assert call(node(1), node(2), port=port) == [None, None] and head.result() == [None]


def test_strangers_do_not_count() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        head = pool.submit(call, node(0, nodes=2, timeout_s=3), port=port)
        for message in (b"GET / HTTP/1.1\r\n\r\n\n", b"[1]\n", b'{"moetrain": 1, "node": "1"}\n', b""):
            until = time.monotonic() + 5
            while time.monotonic() < until:
                try:
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(message)
                    break
                except OSError:
                    time.sleep(0.02)
        assert call(node(1, nodes=2), port=port) == [None] and head.result() == [None]


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (error,) = call(node(0), port=port)
    assert error.id == "E-RENDEZVOUS-003" and f"port {port} of node 0 is taken" in str(error)


def test_nothing_answers() -> None:
    port, began = free_port(), time.monotonic()
    (error,) = call(node(1, timeout_s=1), port=port)
    assert error.id == "E-RENDEZVOUS-002" and f"127.0.0.1:{port}" in str(error) and "refused" in str(error)
    assert time.monotonic() - began >= 1
    (error,) = call(node(1, timeout_s=1, head="no-such-host.invalid"), port=port)
    assert error.id == "E-RENDEZVOUS-002" and "no-such-host.invalid" in str(error)


@contextlib.contextmanager
def answering(*pieces: bytes, pause_s: float = 0.0) -> Iterator[int]:
    """The port of a program that answers everybody with these pieces, and then says no more."""
    taken: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(server.accept()[0])
                threading.Thread(target=answer, args=(taken[-1],), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
    for connection in taken:
        connection.close()


@pytest.mark.parametrize("pieces, pause_s", [
    ((), 0), ((b"x",) * 600, 0.1),                       # silent; a byte now and then
    ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), 0), ((b"[" * 1000 + b"\n",), 0), ((b'{"a":' * 300,), 0),
    ((b"x" * 10**6,), 0), ((b'{"error": {"number": "5", "what": 1}}\n',), 0),
    ((b'{"error": {"number": 5, "other": "x"}}\n',), 0), ((b'{"go": false}\n',), 0),
], ids=["silent", "slow", "HTTP", "brackets", "deep", "long", "parts", "keys", "no"])
def test_something_else_answers(pieces: tuple[bytes, ...], pause_s: float,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the limit, which is RDZV_TIMEOUT to reach it and as long again for its word."""
    monkeypatch.setattr("moetrain.launch.rendezvous._WRITE_S", 0.2)
    began = time.monotonic()
    with answering(*pieces, pause_s=pause_s) as port:
        (error,) = call(node(1, timeout_s=1), port=port)
    assert (error.id == "E-RENDEZVOUS-002" and "not moetrain" in str(error)
            and f"127.0.0.1:{port}" in str(error))
    assert time.monotonic() - began < 15


def test_who_says_nothing_or_too_much_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.launch.rendezvous._MAX_UNIDENTIFIED", 20)
    port = free_port()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as strangers:
        head = pool.submit(call, node(0, nodes=2, timeout_s=60), port=port)
        for number in range(40):
            stranger = strangers.enter_context(reached(port))
            with contextlib.suppress(OSError):
                stranger.sendall((b"", b"{", b"[" * 1000 + b"\n", b"x" * 5000,
                                  b'{"moetrain": 1, "node": 1, "nodes": [], "nproc": 2}\n')[number % 5])
        began = time.monotonic()
        assert call(node(1, nodes=2, timeout_s=60), port=port) == [None] and head.result() == [None]
        assert time.monotonic() - began < 30             # silent ones would have had 5 s each


def reached(port: int) -> socket.socket:
    until = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_the_address_is_that_of_the_route() -> None:
    assert own_address(node(0)) == own_address(node(1)) == "127.0.0.1"
    assert own_address(node(0, head="some-name")) == "some-name"         # the others know it by that name
    assert (interface(node(0, nodes=1, head="127.0.0.1")) in ("lo", None)
            and interface(node(0, head="127.0.0.1")) is None)

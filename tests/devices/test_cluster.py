"""How processes meet before jax starts, and what they agree on: with sockets of the loopback, in threads."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from invoke import invoke, invoke_error
from models import write_hf

from converters.console.errors import InputError
from quantize.cli import command as quantize
from runtime.cli import command as run
from runtime.devices import pjrt
from runtime.devices.cluster import Cluster, meet
from runtime.devices.processes import MESSAGE_BYTES, EndedTogether, Processes
from runtime.run.session import SessionOptions


def _free_address(host: str = "127.0.0.1") -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"{host}:{server.getsockname()[1]}"


def _meet(*clusters: Cluster, wait_s: float = 20.0) -> list[str | None]:
    """What each of the processes, in threads here, raises; None where it met the others."""

    def outcome(cluster: Cluster) -> str | None:
        try:
            return meet(cluster, wait_s)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(clusters)) as pool:
        return list(pool.map(outcome, clusters))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", socket.gethostname()])
def test_processes_meet(host: str) -> None:
    address = _free_address(host)
    assert _meet(*(Cluster(address, 3, each) for each in (2, 0, 1))) == [None] * 3


def test_a_process_that_does_not_come() -> None:
    address = _free_address()
    found = _meet(Cluster(address, 4, 0), Cluster(address, 4, 2), wait_s=2.0)
    assert found[0] == found[1]
    assert found[0] == (
        f"The processes did not meet: process 1, 3 did not come to {address} within 2 s. Start all of them again."
    )


def test_a_coordinator_that_is_not_there() -> None:
    address = _free_address()
    [found] = _meet(Cluster(address, 2, 1), wait_s=1.0)
    assert found.startswith(f"The processes did not meet: there is no process 0 at {address} after 1 s (")


def test_two_with_one_id() -> None:
    address = _free_address()
    found = _meet(*(Cluster(address, 4, each) for each in (0, 1, 1)))
    assert len(set(found)) == 1
    assert "two processes have the id 1" in found[0]


def test_other_numbers_of_processes() -> None:
    address = _free_address()
    found = _meet(Cluster(address, 2, 0), Cluster(address, 3, 1))
    assert len(set(found)) == 1
    assert "process 1 was started as one of 3, process 0 of 2" in found[0]


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        [found] = _meet(Cluster(f"127.0.0.1:{port}", 2, 0))
    assert found.startswith(f"Process 0 can't listen on port {port} (Address already in use).")


def test_something_else_on_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        found = pool.submit(_meet, Cluster(f"127.0.0.1:{server.getsockname()[1]}", 2, 1))
        with server.accept()[0] as connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert "is no process 0 that waits for others" in found.result()[0]


def test_strangers_do_not_disturb() -> None:
    address = _free_address()
    clusters = [Cluster(address, 2, each) for each in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(_meet, clusters[0])
        for words in (b"GET / HTTP/1.1\r\n", b"[1, 2]\n", b""):
            _send(clusters[0].address, words)
        assert _meet(clusters[1]) == [None]
        assert leader.result() == [None]


def _send(address: tuple[str, int], words: bytes) -> None:
    while True:
        try:
            with socket.create_connection(address) as connection:
                return connection.sendall(words)
        except ConnectionRefusedError:  # process 0 is not there yet
            continue


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("10.0.0.1:8476", ("10.0.0.1", 8476)),
        ("[fd00::1]:80", ("fd00::1", 80)),
        ("host-1.example:9", ("host-1.example", 9)),
    ],
)
def test_addresses(address: str, found: tuple[str, int]) -> None:
    assert Cluster(address, 1, 0).address == found


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:0", "host:65536", "a:b:1", "host:1x", "ho st:1"])
def test_no_address(address: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        Cluster(address, 2, 0)


@pytest.mark.parametrize(("processes", "process_id", "words"), [(0, 0, "number of"), (2, 2, "0 to 1"), (2, -1, "0 to")])
def test_no_process(processes: int, process_id: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Cluster("host:1", processes, process_id)


def test_options(tmp_path: Path) -> None:
    invoke(quantize, write_hf(tmp_path / "hf"), "--int8", "--out", tmp_path / "out")
    together, shards = ("--coordinator", "127.0.0.1:80", "--processes", 2), ("--shards", tmp_path / "out")
    assert "give all three, or none" in invoke_error(run, *shards, *together)
    assert "give all three, or none" in invoke_error(run, *shards, "--process-id", 1)
    assert "0 to 1" in invoke_error(run, *shards, *together, "--process-id", 2)
    assert "no HOST:PORT" in invoke_error(run, *shards, *together, "--process-id", 1, "--coordinator", "host")
    assert "eager runs in one process" in invoke_error(run, *shards, *together, "--process-id", 1, "--backend", "eager")
    with pytest.raises(InputError, match="inductor runs in one process"):
        SessionOptions(backend="inductor", cluster=Cluster("host:1", 2, 0))


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, True),
        ({}, True),
    ],
)
def test_the_hosts_of_a_slice(variables: dict[str, str], joins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variables that jax reads; without them jax asks a TPU VM's metadata, which may not be there."""
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []

    def find_nothing() -> None:
        asked.append(True)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(pjrt, "_initialize", find_nothing)
    if joins and variables:
        with pytest.raises(InputError, match="jax can't find the slice of this host"):
            pjrt._join_slice()
    else:
        pjrt._join_slice()
    assert bool(asked) == joins


def _agree(*given: tuple[dict[str, object], Exception | None]) -> list[Exception | None]:
    """What each of several processes raises that say these facts, or have these faults."""
    messages: list[bytes] = []

    class Heard(Exception):
        pass

    def listen(message: bytes) -> list[bytes]:
        messages.append(message)
        raise Heard

    for facts, fault in given:
        with pytest.raises(Heard):
            Processes(0, 2, listen).agree(facts, fault)
    assert {len(message) for message in messages} == {MESSAGE_BYTES}
    assert all(json.loads(message) for message in messages)
    found: list[Exception | None] = []
    for index, (facts, fault) in enumerate(given):
        try:
            found.append(Processes(index, len(given), lambda _: messages).agree(facts, fault))
        except EndedTogether as error:
            found.append(error)
    return found


def test_agreement() -> None:
    assert _agree(*[({"prompts": [[1, 2]], "seed": 3}, None)] * 3) == [None] * 3


def test_what_differs_is_named_in_all() -> None:
    same, other = {"a": 1, "b": [2], "c": 3}, {"a": 1, "b": [3], "c": "3"}
    found = _agree((same, None), (same, None), (other, None))
    assert [str(error) for error in found] == [
        "Process 2 and process 0 do not have the same b and c. Start all processes with the same options, from the "
        "same shards."
    ] * 3


def test_a_fault_is_told_by_the_one_and_passed_on_by_the_others() -> None:
    found = _agree(({"a": 1}, None), ({"a": 2}, InputError("ä lacks a file.")))
    assert [str(error) for error in found] == ["Process 1 can't run: ä lacks a file.", "ä lacks a file."]


def test_a_long_fault_is_cut() -> None:
    [first, _] = _agree(({}, None), ({}, InputError("\N{GRINNING FACE}" * 5000)))
    assert len(str(first)) < 700


def test_alone_a_fault_is_raised_as_it_is() -> None:
    with pytest.raises(FileNotFoundError):
        Processes().agree({}, FileNotFoundError("x"))

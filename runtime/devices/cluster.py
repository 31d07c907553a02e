"""Which process of several this is, and how they meet before jax starts.

jax ends a process without a readable word where the others don't come or the port is taken. So the processes meet on
the coordinator's port first, over a connection of their own, and jax takes the port over.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from converters.console.errors import InputError, shown

WAIT_S = 60  # for the other processes; a model's weights are read only after that
_RETRY_S = 0.2
_GREETING_S = 5.0  # for a message that a connected process sends at once
_LONGEST_LINE = 4096
_PROCESSES, _PROCESS_ID, _FAULT = "processes", "process_id", "fault"  # the keys of what is sent
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Cluster:
    """This process among those that run one program. Raises InputError for values with which none can meet."""

    coordinator: str  # HOST:PORT of process 0, as every process reaches it; the port must be free there
    processes: int
    process_id: int  # from 0

    def __post_init__(self) -> None:
        host, port = self.address
        if not host or not 1 <= port <= 65535:
            raise InputError(f"The coordinator {shown(self.coordinator)} is no HOST:PORT; write it like 10.0.0.1:8476.")
        if type(self.processes) is not int or self.processes < 1:
            raise InputError(f"The number of processes is {shown(self.processes)}; give a whole number from 1 on.")
        if type(self.process_id) is not int or not 0 <= self.process_id < self.processes:
            raise InputError(
                f"The process id is {shown(self.process_id)}; with {self.processes} in all, give one from 0 to "
                f"{self.processes - 1}, another in each process."
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host, without brackets, and port; ("", 0) where ``coordinator`` isn't written so."""
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+):([0-9]{1,5})", self.coordinator)
        return (match[1].strip("[]"), int(match[2])) if match else ("", 0)

    @property
    def is_local(self) -> bool:
        """Whether the coordinator can be reached from its own machine alone."""
        return self.address[0] in _LOOPBACK

    @property
    def bind_address(self) -> str:
        """Where jax's service of process 0 listens."""
        return self.coordinator if self.is_local else f"[::]:{self.address[1]}"

    def virtual_chips(self, chips: int) -> int:
        """The CPU's virtual chips of each process. Raises InputError where ``chips`` can't be shared equally."""
        if chips % self.processes:
            raise InputError(
                f"The shards are for {chips} chips, which {self.processes} processes can't share equally. Start as "
                f"many as divide {chips}, or re-shard: llama-quantize SHARDS --chips N --out OTHER."
            )
        return chips // self.processes


def meet(cluster: Cluster, wait_s: float = WAIT_S) -> None:
    """Wait until all processes are there. Raises InputError, in each that is there, where some don't come or fit."""
    deadline = time.monotonic() + wait_s
    fault = _receive(cluster, deadline, wait_s) if cluster.process_id == 0 else _report(cluster, deadline, wait_s)
    if fault:
        raise InputError(f"The processes did not meet: {fault}. Start all of them again.")


def _receive(cluster: Cluster, deadline: float, wait_s: float) -> str | None:
    """Wait for the others as process 0, and tell those that came why they can't go on; None where they can."""
    came: list[_Greeting] = []
    with ExitStack() as stack:
        server = stack.enter_context(_listen(cluster))
        fault = None
        while not fault and len(came) < cluster.processes - 1:
            if time.monotonic() >= deadline:
                ids = {greeting.process_id for greeting in came}
                missing = ", ".join(str(each) for each in range(1, cluster.processes) if each not in ids)
                fault = f"process {missing} did not come to {cluster.coordinator} within {wait_s:.0f} s"
            elif greeting := _accept(server, stack):
                came.append(greeting)
                fault = _misfit(cluster, came)
        for greeting in came:
            with suppress(OSError):
                greeting.connection.sendall(json.dumps({_FAULT: fault}).encode() + b"\n")
    return fault


def _report(cluster: Cluster, deadline: float, wait_s: float) -> str | None:
    """Go to process 0, and wait for what it says: why the processes can't go on, or None where they can."""
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(cluster.address, timeout=_GREETING_S) as connection:
                hello = {_PROCESSES: cluster.processes, _PROCESS_ID: cluster.process_id}
                connection.sendall(json.dumps(hello).encode() + b"\n")
                connection.settimeout(max(0.0, deadline - time.monotonic()) + wait_s)  # process 0 may have begun later
                answer = _read_line(connection)
        except OSError as error:  # not there yet
            reason = error.strerror or str(error)
            time.sleep(_RETRY_S)
            continue
        if _FAULT not in answer:
            return f"what answers at {cluster.coordinator} is no process 0 that waits for others, or it has ended"
        return answer[_FAULT]
    return f"there is no process 0 at {cluster.coordinator} after {wait_s:.0f} s ({reason})"


class _Greeting(NamedTuple):
    """What a process that came says of itself."""

    connection: socket.socket
    process_id: Any
    processes: Any


def _misfit(cluster: Cluster, came: list[_Greeting]) -> str | None:
    """Why the last that came doesn't fit the others."""
    *others, last = came
    if last.processes != cluster.processes:
        return f"process {last.process_id} was started as one of {last.processes}, process 0 of {cluster.processes}"
    if last.process_id in {0, *(other.process_id for other in others)}:
        return f"two processes have the id {last.process_id}"
    return None


def _accept(server: socket.socket, stack: ExitStack) -> _Greeting | None:
    """The next process that comes; None where none does within a moment, or what came is none."""
    server.settimeout(_RETRY_S)
    try:
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(_GREETING_S)
        hello = _read_line(connection)
    except OSError:
        return None
    if _PROCESSES not in hello or _PROCESS_ID not in hello:
        return None
    return _Greeting(connection, hello[_PROCESS_ID], hello[_PROCESSES])


def _listen(cluster: Cluster) -> socket.socket:
    host, port = cluster.address
    try:
        if cluster.is_local:
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(
            f"Process 0 can't listen on port {port} ({reason}). Give all processes another in --coordinator."
        ) from error


def _read_line(connection: socket.socket) -> dict[str, Any]:
    """The JSON object on the next line; empty where something else was sent, or nothing."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
        part = connection.recv(_LONGEST_LINE)
        if not part:
            break
        line += part
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}

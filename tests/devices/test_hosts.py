"""Several processes that run one model, as the hosts of a slice do: virtual CPU chips, gloo, the loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from invoke import SUPPORT, invoke
from models import write_hf

from quantize.cli import command as quantize

CHIPS = 4
LIMIT_S = 240  # far more than any of these takes on a busy machine; what hangs is killed then
MAIN = ("-c", "from runtime.cli import main; main()")
SIZES = ("--max-new-tokens", "12", "--max-seq-len", "24", "--buckets", "8", "--dtype", "float32", "--json", "-")
PROMPT = ("--prompt-ids", "1,5,9")

pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen[str]]


_NEEDS = re.compile("^Note: Memory of this host: .*\n", re.M)  # every process says what it takes


class Ended(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The one line of an error."""
        assert self.stdout == ""
        assert self.stderr.startswith("Error: "), self.stderr
        assert len(self.stderr.splitlines()) == 1, self.stderr
        return self.stderr.rstrip("\n")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All chips' files of a small random LLaMA."""
    root = tmp_path_factory.mktemp("hosts")
    invoke(quantize, write_hf(root / "hf"), "--int8", "--chips", CHIPS, "--out", root / "shards")
    return root / "shards"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python programs, and ends those that are left, by their ids."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> subprocess.Popen[str]:
        line = [sys.executable, *map(str, arguments)]
        environment = os.environ | {"PJRT_DEVICE": "CPU"}
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _hosts(shards: Path, root: Path, count: int) -> list[Path]:
    """A copy of the shards for each process, with no other chips' files than its own."""
    found = []
    for host in range(count):
        found.append(Path(shutil.copytree(shards, root / f"host{host}")))
        for chip in range(CHIPS):
            if chip * count // CHIPS != host:
                (found[-1] / f"chip-{chip:02d}-of-{CHIPS:02d}.safetensors").unlink()
    return found


def _options(host: int, count: int, port: int) -> tuple[object, ...]:
    return ("--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process-id", host)


def _ended(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """What the processes printed, and their statuses; fails for one that doesn't end."""
    deadline = time.monotonic() + LIMIT_S
    found = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        found.append(Ended(process.returncode, stdout, _NEEDS.sub("", stderr)))
    return found


def _run(start: Start, hosts: Sequence[Path], *arguments: Sequence[object]) -> list[Ended]:
    """llama-run in a process for every directory, with ``arguments`` for each, or the same for all."""
    port, count = _free_port(), len(hosts)
    given = arguments if len(arguments) == count else arguments * count
    return _ended(
        [
            start(*MAIN, "--shards", path, *_options(host, count, port), *SIZES, *given[host])
            for host, path in enumerate(hosts)
        ]
    )


def _alone(start: Start, shards: Path, *arguments: object) -> dict:
    [ended] = _ended([start(*MAIN, "--shards", shards, *SIZES, *arguments)])
    assert ended.status == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("count", "arguments"),
    [
        (2, PROMPT),
        (4, PROMPT),
        (2, ("--batch-size", "2", "--prompt-len", "11", "--temperature", "0.9", "--top-k", "20", "--seed", "3")),
    ],
)
def test_the_tokens_are_those_of_one_process(
    count: int, arguments: tuple[str, ...], shards: Path, start: Start, tmp_path: Path
) -> None:
    """Greedy and drawn, a prompt of two sections too; only the leader prints, and nothing is compiled late."""
    expected = _alone(start, shards, *arguments)
    leader, *others = _run(start, _hosts(shards, tmp_path, count), arguments)
    assert (leader.status, leader.stderr) == (0, "")
    found = json.loads(leader.stdout)
    assert found["token_ids"] == expected["token_ids"]
    assert (found["chips"], found["recompilations"]) == (CHIPS, 0)
    assert found["memory"]["parameter_bytes_per_chip"] == expected["memory"]["parameter_bytes_per_chip"]
    assert others == [Ended(0, "", "")] * (count - 1)


LATE = """
import time
from runtime.cli import main
from runtime.devices import pjrt

compile_at_once = pjrt.Mesh.compile

def compile_late(*args):
    pjrt.Mesh.compile = compile_at_once
    time.sleep(35)
    return compile_at_once(*args)

pjrt.Mesh.compile = compile_late
main()
"""


def test_one_may_compile_for_longer_than_gloo_waits(shards: Path, start: Start, tmp_path: Path) -> None:
    """30 seconds, when connections are made."""
    port = _free_port()
    processes = [
        start(*program, "--shards", path, *_options(host, 2, port), *SIZES, *PROMPT)
        for host, (path, program) in enumerate(zip(_hosts(shards, tmp_path, 2), (MAIN, ("-c", LATE)), strict=True))
    ]
    leader, other = _ended(processes)
    assert json.loads(leader.stdout)["token_ids"] == _alone(start, shards, *PROMPT)["token_ids"], leader.stderr
    assert other == Ended(0, "", "")


def test_a_host_without_a_file_ends_all(shards: Path, start: Start, tmp_path: Path) -> None:
    hosts = _hosts(shards, tmp_path, 2)
    (hosts[1] / "chip-03-of-04.safetensors").unlink()
    ended = _run(start, hosts, PROMPT)
    assert [each.status for each in ended] == [2, 2]
    assert ended[1].line.startswith(f"Error: {hosts[1]} lacks chip-03-of-04.safetensors.")
    assert ended[0].line.startswith(f"Error: Process 1 can't run: {hosts[1]} lacks chip-03-of-04.safetensors.")


def test_a_file_cut_short_ends_all(shards: Path, start: Start, tmp_path: Path) -> None:
    hosts = _hosts(shards, tmp_path, 2)
    path = hosts[0] / "chip-00-of-04.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    ended = _run(start, hosts, PROMPT)
    assert [each.status for each in ended] == [2, 2]
    assert ended[0].line.startswith(f"Error: {path} is ")
    assert ended[1].line.startswith(f"Error: Process 0 can't run: {path} is ")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--prompt-ids", "1,5"), "max_new_tokens and prompts"),
        ((*PROMPT, "--temperature", "0.5"), "sampled and sampling"),
        ((*PROMPT, "--layers", "1"), "layers and model"),
    ],
)
def test_disagreeing_processes_end(
    options: tuple[str, ...], named: str, shards: Path, start: Start, tmp_path: Path
) -> None:
    more = ("--max-new-tokens", "3") if "max_new_tokens" in named else ()
    ended = _run(start, _hosts(shards, tmp_path, 2), PROMPT, (*options, *more))
    assert [each.status for each in ended] == [2, 2]
    assert ended[0].line == ended[1].line
    assert f"Process 1 and process 0 do not have the same {named}." in ended[0].line


@pytest.mark.parametrize(
    ("victim", "end", "status"),
    [(0, signal.SIGKILL, -9), (1, signal.SIGKILL, -9), (1, signal.SIGTERM, -15), (0, signal.SIGINT, 130)],
)
def test_the_others_end_with_one_that_is_killed(
    victim: int, end: signal.Signals, status: int, shards: Path, start: Start, tmp_path: Path
) -> None:
    """At work: jax's own report of many lines may come before ours, where it is faster than gloo."""
    processes = _at_work(start, shards, tmp_path)
    processes[victim].send_signal(end)
    ended = _ended(processes)
    assert ended[victim].status == status
    _assert_lost(ended[1 - victim])
    if status > 0:
        assert ended[victim].stderr.strip().startswith("Error: Interrupted.")  # after the end of the ^C's line


def test_the_others_end_without_one_that_is_stopped(shards: Path, start: Start, tmp_path: Path) -> None:
    """Its connections stay open, as those of a host whose cable is cut: jax misses its signs of life."""
    lost, stopped = _at_work(start, shards, tmp_path)
    stopped.send_signal(signal.SIGSTOP)
    [ended] = _ended([lost])
    _assert_lost(ended)
    assert stopped.poll() is None


def _at_work(start: Start, shards: Path, root: Path) -> list[subprocess.Popen[str]]:
    """Two processes that have begun to generate, and will not end."""
    port = _free_port()
    begun = [root / "begun0", root / "begun1"]
    processes = [
        start(SUPPORT / "child_host.py", begun[host], "--shards", path, *_options(host, 2, port), *SIZES, *PROMPT)
        for host, path in enumerate(_hosts(shards, root, 2))
    ]
    deadline = time.monotonic() + LIMIT_S
    while not all(path.exists() for path in begun):
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.1)
    return processes


def _assert_lost(ended: Ended) -> None:
    assert (ended.status, ended.stdout) == (2, "")
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("Error: Another process of this run has ended, or can't be reached any more")


def test_chips_that_processes_cannot_share(shards: Path, start: Start) -> None:
    ended = _run(start, [shards] * 3, PROMPT)
    assert [each.status for each in ended] == [2, 2, 2]
    for each in ended:
        assert each.line.startswith("Error: The shards are for 4 chips, which 3 processes can't share equally.")

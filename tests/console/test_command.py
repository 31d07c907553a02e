"""How a command ends: whatever it raises, one line on stderr and an exit status; a traceback for who asks for one."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import click
import pytest
from invoke import Result, error_line, invoke, run_command

from converters.cli import command as convert
from converters.console.command import TRACEBACK_VARIABLE, run
from converters.console.errors import InputError
from quantize.cli import command as quantize
from runtime.bench import child as bench_run
from runtime.bench.child import RunFailed, Runner
from runtime.bench_cli import command as bench
from runtime.cli import command as run_shards
from runtime.eval_cli import command as evaluate
from runtime.plan_cli import command as plan


class Panic(BaseException):
    """What a panic of a library written in Rust is in Python."""


def deep(count: int = 0) -> int:
    return deep(count + 1)


def raising(error: BaseException | None) -> click.Command:
    @click.command()
    def command() -> None:
        if error is None:
            deep()
        raise error

    return command


FAULT = "This is a fault of the tool. The same command with --traceback (or LLAMA_TRACEBACK=1) shows where."
ENDS = [
    (RuntimeError("mat1 and mat2\nshapes"), 1, f"Error: RuntimeError: mat1 and mat2 shapes. {FAULT}"),
    (KeyError("getpwuid()"), 1, f"Error: KeyError: 'getpwuid()'. {FAULT}"),
    (AssertionError(), 1, f"Error: AssertionError. {FAULT}"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 1, "Error: UnicodeDecodeError: 'utf-8' codec"),
    (UnicodeEncodeError("ascii", "\udce9", 0, 1, "bad \udce9"), 1, "Error: UnicodeEncodeError: 'ascii' codec"),
    (ValueError("x" * 5000), 1, f"Error: ValueError: {'x' * 385}.... {FAULT}"),
    (None, 1, "Error: RecursionError: maximum recursion depth exceeded"),
    (Panic("index out of range"), 1, f"Error: Panic: index out of range. {FAULT}"),
    (StopIteration(), 1, f"Error: StopIteration. {FAULT}"),
    (MemoryError(), 2, "Error: Out of memory. Ask for smaller sizes"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "Error: Out of memory. Ask for smaller sizes"),
    (
        ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot"),
        2,
        "Error: ModuleNotFoundError: No module named 'matplotlib'. Install what is missing or doesn't fit: "
        "pip install 'llama-tpu-toolchain[bench]'.",
    ),
    (ImportError("undefined symbol"), 2, "pip install 'llama-tpu-toolchain'."),
    (ImportError("no", name="jaxlib.xla"), 2, "pip install 'llama-tpu-toolchain'."),
    (ImportError("no", name="libtpu.sdk"), 2, "pip install 'llama-tpu-toolchain[tpu]'."),
    (OSError(5, "Input/output error", "a\udce9"), 2, "Error: a\\udce9: Input/output error. Check the path"),
    (InputError("The file is damaged."), 2, "Error: The file is damaged."),
]


@pytest.mark.parametrize(("error", "status", "says"), ENDS, ids=lambda value: repr(value)[:40])
def test_whatever_is_raised_gives_one_line(error: BaseException | None, status: int, says: str) -> None:
    code, result = run_command(raising(error))
    assert code == status
    assert says in error_line(result)


@pytest.mark.parametrize(("error", "status", "says"), ENDS, ids=lambda value: repr(value)[:40])
def test_the_traceback_is_printed_for_who_wants_it(
    error: BaseException | None, status: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_flag = run_command(raising(error), "--traceback")
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    by_variable = run_command(raising(error))
    for code, result in (by_flag, by_variable):
        assert code == status
        assert result.stderr.startswith("Traceback (most recent call last)")
        assert "test_command.py" in result.stderr
        assert says.removesuffix(FAULT) in result.stderr.splitlines()[-1]
        assert "--traceback" not in result.stderr.splitlines()[-1]
    monkeypatch.setenv(TRACEBACK_VARIABLE, "0")
    error_line(run_command(raising(error))[1])


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [(KeyboardInterrupt(), 130, "Error: Interrupted. Run"), (EOFError("cut short"), 1, "Error: EOFError: cut short.")],
)
def test_what_click_takes_for_an_interruption(error: BaseException, status: int, says: str) -> None:
    """It ends the line that a terminal shows as ^C."""
    code, result = run_command(raising(error))
    assert code == status
    assert result.stderr.startswith("\n" + says)
    assert result.stderr.count("\n") == 2


def test_a_fault_in_a_helper_thread_gives_one_line_too() -> None:
    @click.command()
    def command() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: {}["missing"]).result()

    code, result = run_command(command)
    assert (code, error_line(result)) == (1, f"Error: KeyError: 'missing'. {FAULT}")


@pytest.mark.parametrize(
    "command", [convert, quantize, run_shards, plan, bench, evaluate], ids=lambda c: c.callback.__module__
)
def test_every_command_has_the_flag(command: click.Command) -> None:
    for _ in range(2):
        assert invoke(command, "--help").stdout.count("--traceback") == 1


def test_a_run_of_a_bench_that_has_a_fault(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason is the line; its traceback goes to the bench's stderr where it is wanted."""
    (tmp_path / "faulty.py").write_text(
        "import click\nfrom converters.console.command import run\n"
        "@click.command()\ndef command():\n    raise KeyError('caf\\u00e9')\n"
        "def main():\n    run(command)\n",
        "utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runner = Runner({}, None, tmp_path)

    @click.command()
    def command() -> None:
        try:
            runner._figures("faulty", [])
        except RunFailed as failure:
            click.echo(f"failed: {failure}")

    for arguments, tracebacks in (((), 0), (("--traceback",), 1)):
        result: Result = invoke(command, *arguments)
        assert result.stdout.startswith("failed: KeyError: 'café'. This is a fault of the tool.")
        assert result.stderr.count("Traceback") == tracebacks


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "40")])
def test_a_run_ended_by_any_signal(number: int, name: str) -> None:
    """40 is one of the real-time signals, most of which have no name."""
    assert bench_run._reason(subprocess.CompletedProcess([], -number, "", "")) == f"ended by signal {name}"


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_a_stream_that_takes_nothing(device: str) -> None:
    """One line and no complaint of Python's at exit; a status as ever where even stderr takes nothing."""
    code = "from runtime.plan_cli import main; main()"
    line = [sys.executable, "-c", code, "--config", "tiny"]
    with open(device, "r+b", buffering=0) as stream:
        done = subprocess.run(line, stdout=stream, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == (2 if device == "/dev/full" else 0)
        assert done.stderr.count("\n") == (1 if device == "/dev/full" else 0)
        assert done.stderr == "" or done.stderr.startswith("Error: No space left on device")
        assert subprocess.run([*line, "--layers"], stderr=stream, check=False).returncode == 2


def test_run_ends_the_process_in_any_case() -> None:
    with pytest.raises(SystemExit) as end:
        run(raising(SystemExit(7)), [])
    assert end.value.code == 7

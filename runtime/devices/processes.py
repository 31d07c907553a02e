"""Several processes that run one program: what they agree on before they compute, and how they end.

A program over the chips of several processes waits in each for all others. So where one can't go on, or was given
something else, all have to learn of it before the program starts, and where one ends early the others must not wait.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from converters.console.errors import InputError

MESSAGE_BYTES = 4096  # all processes exchange as many
_LONGEST_FAULT = 600  # characters, of up to 4 bytes
_LOST = "Another process of this run has ended, or can't be reached any more"
_AGAIN = "Look at what the others say, and start all of them again."
# What gloo and the coordination service, between CPUs, say in exceptions of several types.
_LOST_WORDS = ("gloo", "coordination service", "connection closed by peer", "socket closed", "unavailable:")

_broken = False  # whether this process of several has failed while the others go on
_handlers: list[Any] = []  # what ctypes has made must outlive its use


class EndedTogether(InputError):
    """An error that all processes raise at the same time."""


class Processes:
    """The processes whose chips run one program. Without arguments: this one alone."""

    def __init__(
        self, index: int = 0, count: int = 1, gather: Callable[[bytes], list[bytes]] = lambda message: [message]
    ) -> None:
        """``gather`` takes this process's MESSAGE_BYTES and returns those of all processes, once all have called it."""
        self.index, self.count, self._gather = index, count, gather

    def agree(self, facts: Mapping[str, object], fault: Exception | None = None) -> None:
        """Return once all processes have called this with the same facts, by name, and without a fault.

        Else raise EndedTogether in all of them: with its own fault, or that of the first process with one, or naming
        the first process that differs from process 0, and in what. Facts are compared by ``repr``. One process alone
        raises its fault as it is.
        """
        if self.count == 1:
            if fault is not None:
                raise fault
            return
        digests = {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in facts.items()}
        text = None if fault is None else str(fault)[:_LONGEST_FAULT]
        message = json.dumps({"fault": text, "facts": digests}, ensure_ascii=False).encode(errors="replace")
        if len(message) > MESSAGE_BYTES:
            raise ValueError(f"{len(message)} bytes of facts are more than processes exchange")
        said = [json.loads(each) for each in self._gather(message.ljust(MESSAGE_BYTES))]
        if fault is not None:
            raise EndedTogether(str(fault)) from fault
        for process, each in enumerate(said):
            if each["fault"] is not None:
                raise EndedTogether(f"Process {process} can't run: {each['fault']}")
        for process, each in enumerate(said):
            if differing := _differing(said[0]["facts"], each["facts"]):
                raise EndedTogether(
                    f"Process {process} and process 0 do not have the same {' and '.join(differing)}. "
                    "Start all processes with the same options, from the same shards."
                )


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


@contextmanager
def guarded() -> Iterator[None]:
    """Take note of an error of this process alone, for ``leave``, and raise one of a lost connection as InputError."""
    global _broken
    try:
        yield
    except EndedTogether:
        raise
    except BaseException as error:
        _broken = True
        if _handlers and isinstance(error, Exception) and any(words in str(error).lower() for words in _LOST_WORDS):
            raise InputError(f"{_LOST}. {_AGAIN}") from error
        raise


def leave(status: int) -> None:
    """End the process at once if it is one of several and failed while the others go on; otherwise, do nothing.

    An ordinary exit would wait for the others, which wait for this process. They find its connections closed.
    """
    if _broken and _handlers:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def expect_aborts() -> None:
    """Have jax's end of this process, where it has lost the others, end with a line of ours.

    jax aborts the process from a thread of its own, after a report of many lines. That is no interruption at an
    arbitrary place: the thread asks for it, so its signal handler may wait for the interpreter and run Python.
    """
    if _handlers:
        return

    def say(_: int) -> None:
        if _broken:  # this process is about to leave with another line
            time.sleep(5)
        os.write(2, f"Error: {_LOST}, or else this one failed as the lines above say. {_AGAIN}\n".encode())
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))

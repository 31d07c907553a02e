"""What the user can put right: every class here ends a command with one line and exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The words of torch on the CPU, of torch on CUDA, and of XLA: none has a class of its own for this on all devices.
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "RESOURCE_EXHAUSTED")


class InputError(Exception):
    """Something the user gave is wrong. The message says what it is and what to do about it."""


class UnmappedTensor(InputError):
    """A tensor of the source that its name table does not know."""


class UnexpectedTensor(InputError):
    """A tensor with a known kind of name that this configuration has no place for."""


class MissingTensor(InputError):
    """A tensor that the configuration needs and the source does not hold."""


class DuplicateTensor(InputError):
    """A tensor that the source holds twice."""


class BadTokenizer(InputError):
    """A tokenizer that can't be read. What to do depends on where it is from: see ``advising``."""


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Have ``advice`` follow what is wrong with a tokenizer."""
    try:
        yield
    except BadTokenizer as error:
        raise InputError(f"{error} {advice}") from None


def shown(value: Any) -> str:
    """A value from a file, short enough for an error line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )

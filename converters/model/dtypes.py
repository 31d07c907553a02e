"""The floating dtypes of weights: which are read and written, what config.json says of them, which one to write."""

from __future__ import annotations

from typing import Any

from converters.console.errors import shown
from converters.console.notes import note

DTYPES = ("bfloat16", "float16", "float32")  # that are written
READ_DTYPES = (*DTYPES, "float64")  # the last is read as float32
# torch's other names of the same dtypes.
_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}


def said_dtype(fields: dict[str, Any]) -> str | None:
    """The dtype that a config.json names, one of DTYPES; None, with a note, where it names none of them.

    ``dtype`` counts before the older ``torch_dtype``, as in transformers.
    """
    said = fields["dtype"] if fields.get("dtype") is not None else fields.get("torch_dtype")
    if said is None:
        return None
    name = said.removeprefix("torch.") if isinstance(said, str) else said
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if name == "float64":
        note("config.json says float64, which is not written; float32 takes its place.")
        return "float32"
    if name in DTYPES:
        return name
    note(f"config.json has the dtype {shown(said)}, which is none of {', '.join(DTYPES)}; it is ignored.")
    return None


def widest(found: set[str]) -> str:
    """The narrowest of DTYPES that holds what all of these READ_DTYPES hold (of float64: to float32's precision)."""
    return next(iter(found)) if len(found) == 1 and found <= set(DTYPES) else "float32"


def dtype_to_write(found: set[str], said: str | None) -> str:
    """What to write tensors of the READ_DTYPES ``found`` in, where the user doesn't say: as they are stored.

    Of a mixed set it is what config.json says (``said``), as in transformers, or else the widest. Notes what is chosen
    where there was a choice.
    """
    stored = {widest({dtype}) for dtype in found}
    if len(stored) == 1:
        (dtype,) = stored
        if said not in (None, dtype):
            note(f"config.json says {said}, but the tensors are {dtype}: {dtype} is written. --dtype sets another.")
        return dtype
    dtype = said if said in stored else widest(stored)
    why = "as config.json says" if dtype == said else "which holds them all"
    note(f"The tensors are {' and '.join(sorted(stored))}: all are written as {dtype}, {why}. --dtype sets another.")
    return dtype

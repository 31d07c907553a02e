"""For which program llama-convert writes a model: its --format, and the options that go with one."""

from __future__ import annotations

from dataclasses import dataclass

from converters.console.errors import InputError

HF, COMPRESSED_TENSORS = FORMATS = ("hf", "compressed-tensors")


@dataclass(frozen=True)
class Target:
    """One of FORMATS; an option that wasn't given is None. Raises InputError for one that its format doesn't have."""

    format: str = HF
    int8_layout: str | None = None

    def __post_init__(self) -> None:
        if self.int8_layout is not None and self.format != COMPRESSED_TENSORS:
            raise InputError(f"--int8-layout goes with --format {COMPRESSED_TENSORS}. Add that, or leave it out.")

    def arguments(self) -> dict[str, str]:
        """What of it the result follows from; nothing for HF, as records had it before there were others."""
        given = {"format": self.format, "int8_layout": self.int8_layout}
        return {} if self.format == HF else {key: value for key, value in given.items() if value is not None}

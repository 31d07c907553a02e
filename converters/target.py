"""For which program llama-convert writes a model: its --format, and the options that go with one."""

from __future__ import annotations

from dataclasses import dataclass

from converters.console.errors import InputError

HF, COMPRESSED_TENSORS, GGUF = FORMATS = ("hf", "compressed-tensors", "gguf")


@dataclass(frozen=True)
class Target:
    """One of FORMATS; an option that wasn't given is None. Raises InputError for one that its format doesn't have."""

    format: str = HF
    int8_layout: str | None = None
    gguf_type: str | None = None

    def __post_init__(self) -> None:
        for option, value, format_name in (
            ("--int8-layout", self.int8_layout, COMPRESSED_TENSORS),
            ("--gguf-type", self.gguf_type, GGUF),
        ):
            if value is not None and self.format != format_name:
                raise InputError(f"{option} goes with --format {format_name}. Add that, or leave it out.")

    def arguments(self) -> dict[str, str]:
        """What of it the result follows from; nothing for HF, as records had it before there were others."""
        given = {"format": self.format, "int8_layout": self.int8_layout, "gguf_type": self.gguf_type}
        return {} if self.format == HF else {key: value for key, value in given.items() if value is not None}

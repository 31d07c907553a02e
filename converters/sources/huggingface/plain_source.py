"""The weights of a Hugging Face directory as a source: those that are stored as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from converters.model.config import ModelConfig
from converters.model.dtypes import dtype_to_write
from converters.sources.fingerprint import fingerprint
from converters.sources.huggingface.surplus import Held
from converters.tokenizers.auxiliary_files import read_auxiliary_files, with_tokenizer

if TYPE_CHECKING:
    import torch


class HFSource:
    """The weights of a Hugging Face directory under the TensorSource protocol."""

    def __init__(
        self, directory: Path, config: ModelConfig, holder: dict[str, Held], found: set[str], said: str | None
    ) -> None:
        self.config = config
        self.directory = directory
        self._holder = holder
        self._stored_dtypes, self._said_dtype = found, said
        self._auxiliary = with_tokenizer(directory, config)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        values = self._holder[name].rows(start, stop)
        return values.float() if values.dtype == torch.float64 else values

    def default_dtype(self) -> str:
        return dtype_to_write(self._stored_dtypes, self._said_dtype)

    def fingerprint(self) -> str:
        return fingerprint(self.config, self.files(), read_auxiliary_files(self.directory))

    def files(self) -> list[Path]:
        return sorted({held.path for held in self._holder.values()})

    def auxiliary_files(self) -> dict[str, bytes]:
        return dict(self._auxiliary)

"""What a calibration keeps on the disk while it runs, so that the next run goes on after the last whole layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from converters.console.errors import InputError
from converters.files.whole import partial_path, publish, write_partial

_MADE_BY = "llama-quantize --calibrate"
_KEPT = 3  # layers: files are written behind what is computed, by less than that


class Scratch:
    """Tensors by name after each layer, in ``directory``, for the run that ``key`` stands for.

    Files of other keys are replaced, those of other tools never.
    """

    def __init__(self, directory: Path, key: str, kept: int | None = _KEPT) -> None:
        """``kept`` is how many layers are kept, the last ones; None: all."""
        self._directory, self._key, self._kept = directory, key, kept

    def last(self, before: int) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The number of the latest layer saved, of those before layer ``before``, and its tensors; None without one."""
        for layer in range(before - 1, -1, -1):
            path = self._path(layer)
            if path.is_file() and self._is_whole(path):
                return layer, self.load(layer)
        return None

    def load(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors that were saved after ``layer``."""
        with safe_open(self._path(layer), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def save(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors after ``layer``, and no longer those of a few layers before."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._path(layer)
        if path.exists() and not self._is_ours(path):
            raise InputError(f"{path} was not written by this tool. Move it away, or give another folder.")
        contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_partial(self._unfinished(layer), save(contents, {"made_by": _MADE_BY, "key": self._key}))
        publish(partial_path(self._unfinished(layer)), path)
        if self._kept is not None:
            self._remove(layer - self._kept)

    def clear(self, layers: int) -> None:
        """Remove what is kept of so many layers."""
        for layer in range(layers):
            self._remove(layer)
            partial_path(self._unfinished(layer)).unlink(missing_ok=True)

    def _remove(self, layer: int) -> None:
        if layer >= 0 and self._is_ours(self._path(layer)):
            self._path(layer).unlink()

    def _path(self, layer: int) -> Path:
        return self._directory / f"calibration-{layer:05d}.safetensors"

    def _unfinished(self, layer: int) -> Path:
        """What a layer's file is called until it is whole: by this run's key, so that it is nobody else's."""
        return self._directory / f"{self._path(layer).name}.{self._key[:16]}"

    def _is_ours(self, path: Path) -> bool:
        return self._said(path, "made_by") == _MADE_BY

    def _is_whole(self, path: Path) -> bool:
        return self._is_ours(path) and self._said(path, "key") == self._key

    @staticmethod
    def _said(path: Path, key: str) -> str | None:
        try:
            with safe_open(path, "pt") as file:
                return (file.metadata() or {}).get(key)
        except (SafetensorError, OSError):
            return None

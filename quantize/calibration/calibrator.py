"""What runs a source's layers over a text. The stage that has them provides it, found by its entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from converters.console.errors import InputError
from converters.console.progress import Advance
from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.moments import Moments
from quantize.formats.weight_format import Encoded
from quantize.shards.scheme import Scheme
from quantize.slices import Slice

if TYPE_CHECKING:
    import torch

GROUP = "llama_quantize.calibration"
WINDOW = 512  # tokens that see each other


class FeedbackLayers(Protocol):
    """A model's layers, each rounded for the inputs that the rounded ones before it give."""

    def encoded(self, number: int) -> dict[str, Encoded]:
        """Its weights in formats with integers, by name. Layers are asked for in ascending order."""
        ...

    def clear(self) -> None:
        """Remove what is kept on the disk for another run to go on from."""
        ...


@dataclass(frozen=True)
class FitTarget:
    """What a mixture of formats is to fit: a slice with its cache, or ``weight_bytes`` of parameters on each chip."""

    name: str
    chips: int
    slice: Slice | None = None
    weight_bytes: int = 0
    batch_size: int = 1
    max_seq_len: int = 256


@dataclass(frozen=True)
class Fit:
    """A mixture of formats for a target."""

    scheme: Scheme
    predicted: float  # nats per token
    table: list[list[str]]  # what went where, a header first
    parameter_bytes: int  # on each chip
    lines: list[str]  # what the compiler says


class Divergence(NamedTuple):
    """The mean of KL(exact || rounded) in nats per token, and its standard error."""

    mean: float
    error: float


class Calibrator(Protocol):
    """A module with these functions. ``windows`` are token ids [N, T].

    ``scratch`` is a folder for what a later run with the same ``key`` can go on from.
    """

    def read_windows(
        self, source: TensorSource, where: Path, paths: Sequence[Path], tokens: int, after: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first so many tokens of the texts in windows, and up to so many that come ``after`` them, maybe none.

        Raises InputError for what can't be read.
        """
        ...

    def gather_moments(
        self,
        source: TensorSource,
        config: ModelConfig,
        windows: torch.Tensor,
        scratch: Path,
        key: str,
        advance: Advance,
    ) -> Moments:
        """Those of all layers' linears; ``advance`` is told layers."""
        ...

    def gather_gradients(
        self,
        source: TensorSource,
        config: ModelConfig,
        windows: torch.Tensor,
        scratch: Path,
        key: str,
        advance: Advance,
    ) -> Moments:
        """Mean squares of the gradients by all layers' linears' outputs; ``advance`` is told layers, each twice."""
        ...

    def candidates(self, config: ModelConfig, zero_points: bool) -> dict[str, list[str]]:
        """The formats that ``fit`` chooses from, by weight."""
        ...

    def check_fit(self, config: ModelConfig, target: FitTarget, zero_points: bool) -> None:
        """Raise InputError where it is known beforehand that nothing fits."""
        ...

    def fit(self, config: ModelConfig, losses: Mapping[str, Mapping[str, float]], target: FitTarget) -> Fit:
        """The mixture of the least predicted loss. Raises InputError where none fits."""
        ...

    def measure_divergence(
        self, exact: TensorSource, rounded: TensorSource, config: ModelConfig, windows: torch.Tensor, advance: Advance
    ) -> Divergence:
        """Over windows of tokens; ``advance`` is told layers."""
        ...

    def clear(self, scratch: Path, key: str, config: ModelConfig) -> None:
        """Remove what ``gather_moments`` left in ``scratch``."""
        ...

    def feedback_layers(
        self, source: TensorSource, config: ModelConfig, scheme: Scheme, windows: torch.Tensor, scratch: Path, key: str
    ) -> FeedbackLayers:
        """The layers to be rounded with error feedback."""
        ...


@dataclass(frozen=True)
class Calibration:
    """The text that a model is calibrated on, in windows of token ids [N, T]."""

    windows: torch.Tensor
    held_out: torch.Tensor  # [M, T]: of what comes after them, for measuring; M may be 0

    @property
    def digest(self) -> str:
        """Of the tokens and how they are cut."""
        shape = "x".join(map(str, self.windows.shape))
        return sha256(shape.encode() + self.windows.numpy().astype("<i8").tobytes()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """What is recorded of it."""
        return {"tokens": self.windows.numel(), "sha256": self.digest}


def find_calibrator() -> Calibrator:
    """The module that provides it. Raises InputError where the installation lacks it."""
    for entry in entry_points(group=GROUP):
        return entry.load()
    raise InputError("--calibrate needs what runs the model, which this installation lacks: pip install -e . again.")

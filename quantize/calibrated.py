"""A checkpoint quantized with a text in view: by moments of inputs, or rounded layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.console.errors import InputError
from converters.console.notes import note
from converters.files.parallel import AHEAD, every_core
from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.awq import Scaled, ScaledSource, Scaler, block_prefix, places
from quantize.calibration.calibrator import Calibration, FeedbackLayers, find_calibrator
from quantize.calibration.gathered import find_moments, key_of
from quantize.calibration.moments import Moments
from quantize.formats.integers import Integers
from quantize.formats.table import AWQ, GPTQ
from quantize.formats.weight_format import Encoded, RowErrors
from quantize.shards.scheme import UNQUANTIZED, Scheme, choices
from quantize.shards.stored import StoredParameter, stored_parameters
from quantize.values import Quantizer

if TYPE_CHECKING:
    import torch

_HELD_OUT = 2048  # tokens after those to calibrate on, to measure on


def read_calibration(source: TensorSource, where: Path, paths: Sequence[Path], tokens: int) -> Calibration:
    """The first so many ``tokens`` of these files. Raises InputError for what can't be read."""
    return Calibration(*find_calibrator().read_windows(source, where, paths, tokens, _HELD_OUT))


def calibrated(
    source: TensorSource, method: str, calibration: Calibration, directory: Path, moments: Moments | None = None
) -> Quantizer:
    """The quantizer of a source by one of METHODS; ``moments`` are kept in ``directory`` if they aren't known yet."""
    if method == GPTQ:
        return FeedbackQuantizer(source, calibration)
    if method == AWQ:
        return ScalingQuantizer(source, calibration, directory, moments)
    return MomentsQuantizer(source, calibration, directory, moments)


class MomentsQuantizer(Quantizer):
    """A checkpoint quantized with its inputs' moments in view."""

    def __init__(
        self, source: TensorSource, calibration: Calibration, directory: Path, moments: Moments | None
    ) -> None:
        super().__init__(source, moments=moments)
        self._calibration, self._directory = calibration, directory

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        self._moments = self._moments or find_moments(self._directory, self._source, config, self._calibration)


class ScalingQuantizer(MomentsQuantizer):
    """A checkpoint whose inputs are scaled by their importance first, block by block as blocks are asked for."""

    is_slow = True

    def __init__(
        self, source: TensorSource, calibration: Calibration, directory: Path, moments: Moments | None
    ) -> None:
        super().__init__(source, calibration, directory, moments)
        self._scaler: Scaler | None = None  # None in a dry run
        self._scaled: dict[str, Scaled] = {}  # by the names' prefix

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        linears = {name: each for name, each in choices(config).items() if each.in_block}
        formats = {name: scheme.format_of(each, config) for name, each in linears.items()}
        scaler = Scaler(self._source, config, linears, formats, self.kept(config, scheme), Moments({}))
        self._check(scaler)
        super().begin(config, scheme, directory)
        self._scaler = replace(scaler, moments=self._moments)
        self._source = ScaledSource(self._source, self._scaled)

    @staticmethod
    def _check(scaler: Scaler) -> None:
        """Raise InputError where nothing can be scaled, and say what can't."""
        found, left = places(scaler.config)
        prefixes = {each.prefix for each in scaler.linears.values()}
        if not any(scaler.can_scale(prefix, place) for prefix in prefixes for place in found):
            raise InputError(
                "--method awq finds nothing to scale: weights whose inputs could be are kept as the source has them "
                "or not quantized. Give another --method."
            )
        if left:
            note(f"Not all inputs can be scaled without changing the model. As they are stay {' and '.join(left)}.")

    def prepare(self, stored: StoredParameter) -> None:
        prefix = stored.parameter.prefix
        if stored.parameter.in_block and self._scaler is not None and prefix not in self._scaled:
            with every_core():
                self._scaled[prefix] = self._scaler.scale(prefix)

    def close(self) -> None:
        """Say what was moved."""
        alphas = [alpha for scaled in self._scaled.values() for alpha in scaled.alphas.values()]
        moved = [alpha for alpha in alphas if alpha]
        mean = f", by a mean alpha of {sum(moved) / len(moved):.2f}" if moved else ""
        note(f"Inputs were scaled in {len(moved)} of {len(alphas)} places{mean}.")

    def _importance(self, name: str) -> torch.Tensor | None:
        found = super()._importance(name)
        scaled = self._scaled.get(block_prefix(name, self._source.config))
        return found if found is None or scaled is None else scaled.importance(name, found)


class FeedbackQuantizer(Quantizer):
    """A checkpoint whose layers are rounded with error feedback, one after the other, as their blocks are asked for."""

    is_slow = True

    def __init__(self, source: TensorSource, calibration: Calibration) -> None:
        super().__init__(source)
        self._calibration = calibration
        self._layers: FeedbackLayers | None = None  # None in a dry run
        self._encoded_layers: dict[str, dict[str, Encoded]] = {}  # by the names' prefix, the last few

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        self._as_they_are = self.kept(config, scheme)
        if self._as_they_are:  # in the layers that are run they are what the source says
            kept = tuple((name, UNQUANTIZED) for name in sorted(self._as_they_are))
            scheme = replace(scheme, overrides=scheme.overrides + kept)
        arguments = {
            "source_fingerprint": self._source.fingerprint(),
            "layers": config.num_layers,
            "calibration": self._calibration.as_json(),
            "scheme": repr(scheme),
        }
        stored = [each for each in stored_parameters(config, scheme) if each.parameter.in_block]
        # Of so many layers before the one that is begun blocks may still be on their way.
        self._behind = -(-AHEAD * config.num_layers // len(stored))
        self._layers = find_calibrator().feedback_layers(
            self._source, config, scheme, self._calibration.windows, directory, key_of(arguments)
        )

    def prepare(self, stored: StoredParameter) -> None:
        prefix = stored.parameter.prefix
        if not self._has_feedback(stored) or prefix in self._encoded_layers:
            return
        while len(self._encoded_layers) > self._behind:
            del self._encoded_layers[next(iter(self._encoded_layers))]
        self._encoded_layers[prefix] = self._layers.encoded(_layer_number(prefix))

    def close(self) -> None:
        """Remove what is kept for another run."""
        if self._layers is not None:
            self._layers.clear()

    def _encoded(self, stored: StoredParameter, start: int, stop: int) -> Encoded:
        if not self._has_feedback(stored):
            return super()._encoded(stored, start, stop)
        whole = self._encoded_layers[stored.parameter.prefix][stored.name]
        tensors = {suffix: tensor[start:stop] for suffix, tensor in whole.tensors.items()}
        return Encoded(tensors, RowErrors(*(column[start:stop] for column in whole.errors)))

    def _has_feedback(self, stored: StoredParameter) -> bool:
        if self._layers is None or stored.name in self._as_they_are:
            return False
        return stored.parameter.in_block and isinstance(stored.format, Integers)


def _layer_number(prefix: str) -> int:
    return int(prefix.rstrip(".").rpartition(".")[2])

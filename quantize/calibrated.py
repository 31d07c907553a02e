"""A checkpoint quantized with a text in view: by moments of inputs, or rounded layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.calibrator import Calibration, FeedbackLayers, find_calibrator
from quantize.calibration.gathered import find_moments, key_of
from quantize.calibration.moments import Moments
from quantize.formats.integers import Integers
from quantize.formats.table import GPTQ
from quantize.formats.weight_format import Encoded, RowErrors
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredParameter
from quantize.values import Quantizer

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


class FeedbackQuantizer(Quantizer):
    """A checkpoint whose layers are rounded with error feedback, one after the other, as their blocks are asked for."""

    def __init__(self, source: TensorSource, calibration: Calibration) -> None:
        super().__init__(source)
        self._calibration = calibration
        self._layers: FeedbackLayers | None = None  # None in a dry run
        self._encoded_layers: dict[str, dict[str, Encoded]] = {}  # by the names' prefix, the last two

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        arguments = {
            "source_fingerprint": self._source.fingerprint(),
            "layers": config.num_layers,
            "calibration": self._calibration.as_json(),
            "scheme": repr(scheme),
        }
        self._layers = find_calibrator().feedback_layers(
            self._source, config, scheme, self._calibration.windows, directory, key_of(arguments)
        )

    def prepare(self, stored: StoredParameter) -> None:
        prefix = stored.parameter.prefix
        if not self._has_feedback(stored) or prefix in self._encoded_layers:
            return
        while len(self._encoded_layers) > 1:  # blocks of the layer before this one may still be on their way
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
        return self._layers is not None and stored.parameter.in_block and isinstance(stored.format, Integers)


def _layer_number(prefix: str) -> int:
    return int(prefix.rstrip(".").rpartition(".")[2])

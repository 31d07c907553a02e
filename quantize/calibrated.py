"""What a run of llama-quantize does with a text: gathers moments once for all formats, or rounds layer by layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from converters.console.notes import note
from converters.console.progress import counted
from converters.model.config import ModelConfig
from converters.output.claim import Wanted, claim
from converters.output.state import State
from converters.sources.source import TensorSource
from quantize.calibration.calibrator import Calibration, FeedbackLayers, find_calibrator
from quantize.calibration.moments import FILE_NAME, Moments, read_moments
from quantize.formats.integers import Integers
from quantize.formats.table import GPTQ
from quantize.formats.weight_format import Encoded, RowErrors
from quantize.shards.scheme import Scheme
from quantize.shards.stored import StoredParameter
from quantize.values import Quantizer


def read_calibration(source: TensorSource, where: Path, paths: Sequence[Path], tokens: int) -> Calibration:
    """The first so many ``tokens`` of these files. Raises InputError for what can't be read."""
    return Calibration(find_calibrator().read_windows(source, where, paths, tokens))


def calibrated(source: TensorSource, method: str, calibration: Calibration, directory: Path) -> Quantizer:
    """The quantizer of a source by one of METHODS; moments are kept in ``directory``."""
    if method == GPTQ:
        return FeedbackQuantizer(source, calibration)
    return MomentsQuantizer(source, calibration, directory)


class MomentsQuantizer(Quantizer):
    """A checkpoint quantized with its inputs' moments in view."""

    def __init__(self, source: TensorSource, calibration: Calibration, directory: Path) -> None:
        super().__init__(source)
        self._calibration, self._directory = calibration, directory

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        self._moments = find_moments(self._directory, self._source, config, self._calibration)


def find_moments(directory: Path, source: TensorSource, config: ModelConfig, calibration: Calibration) -> Moments:
    """Those in ``directory``, gathered first where they aren't there.

    ``config`` is the source's own, possibly cut to fewer layers. Raises InputError where the directory has others.
    """
    arguments = {
        "source_fingerprint": source.fingerprint(),
        "layers": config.num_layers,
        "calibration": calibration.as_json(),
    }
    wanted = Wanted("llama-quantize", directory, arguments, tuple(source.files()), (FILE_NAME,))
    with claim(wanted, lambda path: None, lambda existing: None, force=False) as output:
        if output.state is State.FINISHED:
            note(f"The moments in {directory} are of this model and this text: they are taken.")
        else:
            calibrator, key = find_calibrator(), _key(arguments)
            with counted("Calibrating", config.num_layers) as advance:
                found = calibrator.gather_moments(source, config, calibration.windows, directory, key, advance)
            output.check_sources()
            output.write({FILE_NAME: found.to_file({"calibration": json.dumps(calibration.as_json())})})
            calibrator.clear(directory, key, config)
    return read_moments(directory / FILE_NAME, config)


def _key(arguments: dict[str, Any]) -> str:
    """What tells one run's files from another's."""
    return sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()


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
            self._source, config, scheme, self._calibration.windows, directory, _key(arguments)
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

"""What a run of llama-quantize does with a text: gathers moments once for all formats, or rounds layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.console.columns import columns
from converters.console.errors import InputError
from converters.console.notes import note
from converters.console.progress import counted
from converters.console.units import format_bytes
from converters.files.parallel import AHEAD, every_core
from converters.model.config import ModelConfig
from converters.output.claim import Output, Wanted, claim
from converters.output.state import State
from converters.sources.source import TensorSource
from quantize.calibration.awq import Scaled, ScaledSource, Scaler, block_prefix, places
from quantize.calibration.calibrator import Calibration, FeedbackLayers, Fit, FitTarget, find_calibrator
from quantize.calibration.losses import predicted_losses
from quantize.calibration.moments import FILE_NAME, GRADIENTS, Moments, read_moments
from quantize.formats.integers import Integers
from quantize.formats.table import AWQ, GPTQ
from quantize.formats.weight_format import Encoded, RowErrors
from quantize.shards.reading import Shards
from quantize.shards.scheme import UNQUANTIZED, Scheme, choices
from quantize.shards.source import ShardsSource
from quantize.shards.stored import StoredParameter, stored_parameters
from quantize.values import Quantizer

if TYPE_CHECKING:
    import torch

GRADIENT_TOKENS = 2048  # of the text's: a mean over outputs needs fewer than one by input
HELD_OUT = 2048  # tokens after those, to measure on
_FORCE, _KEEPS = "Give --force", ", and --force keeps it"  # of claim's messages


def read_calibration(source: TensorSource, where: Path, paths: Sequence[Path], tokens: int) -> Calibration:
    """The first so many ``tokens`` of these files. Raises InputError for what can't be read."""
    return Calibration(*find_calibrator().read_windows(source, where, paths, tokens, HELD_OUT))


def calibrated(source: TensorSource, method: str, calibration: Calibration, directory: Path) -> Quantizer:
    """The quantizer of a source by one of METHODS; moments are kept in ``directory``."""
    if method == GPTQ:
        return FeedbackQuantizer(source, calibration)
    if method == AWQ:
        return ScalingQuantizer(source, calibration, directory)
    return MomentsQuantizer(source, calibration, directory)


class MomentsQuantizer(Quantizer):
    """A checkpoint quantized with its inputs' moments in view."""

    def __init__(self, source: TensorSource, calibration: Calibration, directory: Path) -> None:
        super().__init__(source)
        self._calibration, self._directory = calibration, directory

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        self._moments = find_moments(self._directory, self._source, config, self._calibration)


class ScalingQuantizer(MomentsQuantizer):
    """A checkpoint whose inputs are scaled by their importance first, block by block as blocks are asked for."""

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        linears = {name: each for name, each in choices(config).items() if each.in_block}
        formats = {name: scheme.format_of(each, config) for name, each in linears.items()}
        scaler = Scaler(self._source, config, linears, formats, self.kept(config, scheme), Moments({}))
        self._check(scaler)
        super().begin(config, scheme, directory)
        self._scaler = replace(scaler, moments=self._moments)
        self._scaled: dict[str, Scaled] = {}  # by the names' prefix
        self._source = ScaledSource(self._source, self._scaled)

    @staticmethod
    def _check(scaler: Scaler) -> None:
        """Raise InputError where nothing can be scaled, and say what can't."""
        found, left = places(scaler.config)
        prefixes = {each.prefix for each in scaler.linears.values()}
        if not any(scaler.can_scale(prefix, place) for prefix in prefixes for place in found):
            raise InputError(
                "--method awq finds nothing to scale: weights whose inputs could be are kept as the source has them, or "
                "not quantized. Give another --method."
            )
        if left:
            note(f"Not all inputs can be scaled without changing the model. As they are stay {' and '.join(left)}.")

    def prepare(self, stored: StoredParameter) -> None:
        prefix = stored.parameter.prefix
        if stored.parameter.in_block and self._moments is not None and prefix not in self._scaled:
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


def find_moments(directory: Path, source: TensorSource, config: ModelConfig, calibration: Calibration) -> Moments:
    """Those in ``directory``, gathered first where they aren't there.

    ``config`` is the source's own, possibly cut to fewer layers. Raises InputError where the directory has others.
    """

    def gather(key: str) -> Moments:
        with counted("Calibrating", config.num_layers) as advance:
            return find_calibrator().gather_moments(source, config, calibration.windows, directory, key, advance)

    return _found_or_gathered(directory / FILE_NAME, source, config, calibration, gather, of_inputs=True)


def find_gradients(directory: Path, source: TensorSource, config: ModelConfig, calibration: Calibration) -> Moments:
    """The same of the gradients by the linears' outputs, over the first tokens."""

    def gather(key: str) -> Moments:
        windows = calibration.windows[: max(1, GRADIENT_TOKENS // calibration.windows.shape[1])]
        with counted("Differentiating", 2 * config.num_layers) as advance:
            return find_calibrator().gather_gradients(source, config, windows, directory, key, advance)

    return _found_or_gathered(directory / GRADIENTS, source, config, calibration, gather, of_inputs=False)


def _found_or_gathered(
    path: Path,
    source: TensorSource,
    config: ModelConfig,
    calibration: Calibration,
    gather: Callable[[str], Moments],
    of_inputs: bool,
) -> Moments:
    arguments = {
        "source_fingerprint": source.fingerprint(),
        "layers": config.num_layers,
        "calibration": calibration.as_json(),
    }
    wanted = Wanted("llama-quantize", path.parent, arguments, tuple(source.files()), (path.name,))
    with _claimed(wanted) as output:
        if output.state is State.FINISHED:
            note(f"{path} is of this model and this text: it is taken.")
        else:
            key = _key({**arguments, "file": path.name})
            found = gather(key)
            output.check_sources()
            output.write({path.name: found.to_file({"calibration": json.dumps(calibration.as_json())})})
            find_calibrator().clear(path.parent, key, config)
    return read_moments(path, config, of_inputs)


def fit_formats(
    directory: Path,
    source: TensorSource,
    config: ModelConfig,
    calibration: Calibration,
    target: FitTarget,
    zero_points: bool,
) -> Fit:
    """The mixture of formats that fits ``target`` and is expected to lose the least; moments are kept in ``directory``.

    Raises InputError where none fits.
    """
    moments = find_moments(directory, source, config, calibration)
    gradients = find_gradients(directory, source, config, calibration)
    calibrator = find_calibrator()
    tried = calibrator.candidates(config, zero_points)
    total = sum(each.elements for name, each in choices(config).items() if name in tried)
    with counted("Trying formats", total) as advance:
        losses = predicted_losses(source, config, tried, moments, gradients, advance)
    return calibrator.fit(config, losses, target)


def fit_lines(fit: Fit, target: FitTarget) -> list[str]:
    """What went where, and what that is expected to lose."""
    return [
        f"Chosen for {target.name}, {format_bytes(fit.parameter_bytes)} of parameters on each chip:",
        *(f"  {line}" for line in columns(fit.table, left=(0,))),
        f"Predicted loss: {fit.predicted:.4f} nats per token (an estimate, of one weight at a time).",
        *fit.lines,
    ]


def measured_line(source: TensorSource, out: Path, config: ModelConfig, calibration: Calibration) -> str:
    """What the shards in ``out`` lose of their source, over text that they were not calibrated on, if there is some."""
    held_out = calibration.held_out
    windows = held_out if len(held_out) else calibration.windows[: max(1, HELD_OUT // calibration.windows.shape[1])]
    rounded = ShardsSource(Shards(out))
    with counted("Measuring", config.num_layers) as advance:
        found = find_calibrator().measure_divergence(source, rounded, config, windows, advance)
    where = "that follow in the text" if len(held_out) else "that it was calibrated on, which flatters it"
    return f"Measured over {windows.numel()} tokens {where}: {found.mean:.4f} +- {found.error:.4f} nats per token."


@contextmanager
def _claimed(wanted: Wanted) -> Iterator[Output]:
    """``claim``, with what is to be done about a directory of something else said for --moments."""
    entered = False
    try:
        with claim(wanted, lambda path: None, lambda existing: None, force=False) as output:
            entered = True
            yield output
    except InputError as error:
        if entered:
            raise
        problem = str(error).replace(_KEEPS, "").replace("--out", "--moments")
        if _FORCE in problem:
            problem = f"{wanted.out} holds something else than the moments of this model's layers over this text. "
            problem += "Take it away, or give another --moments."
        raise InputError(problem) from None


def _key(arguments: dict[str, Any]) -> str:
    """What tells one run's files from another's."""
    return sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()


class FeedbackQuantizer(Quantizer):
    """A checkpoint whose layers are rounded with error feedback, one after the other, as their blocks are asked for."""

    def __init__(self, source: TensorSource, calibration: Calibration) -> None:
        super().__init__(source)
        self._calibration = calibration
        self._layers: FeedbackLayers | None = None  # None in a dry run
        self._encoded_layers: dict[str, dict[str, Encoded]] = {}  # by the names' prefix, the last few

    def begin(self, config: ModelConfig, scheme: Scheme, directory: Path) -> None:
        self._kept = self.kept(config, scheme)
        if self._kept:  # in the layers that are run they are what the source says
            kept = tuple((name, UNQUANTIZED) for name in sorted(self._kept))
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
            self._source, config, scheme, self._calibration.windows, directory, _key(arguments)
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
        if self._layers is None or stored.name in self._kept:
            return False
        return stored.parameter.in_block and isinstance(stored.format, Integers)


def _layer_number(prefix: str) -> int:
    return int(prefix.rstrip(".").rpartition(".")[2])

"""One run of llama-quantize --fit: what formats are tried, what was chosen, and what that turned out to lose."""

from __future__ import annotations

from pathlib import Path

from converters.console.columns import columns
from converters.console.progress import counted
from converters.console.units import format_bytes
from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.calibrator import Calibration, Fit, FitTarget, find_calibrator
from quantize.calibration.gathered import find_gradients
from quantize.calibration.losses import predicted_losses
from quantize.calibration.moments import Moments
from quantize.shards.reading import Shards
from quantize.shards.scheme import choices
from quantize.shards.source import ShardsSource

_MEASURED_TOKENS = 2048  # of the text that it was calibrated on, where nothing follows it


def fit_formats(
    directory: Path,
    source: TensorSource,
    config: ModelConfig,
    calibration: Calibration,
    target: FitTarget,
    zero_points: bool,
    moments: Moments,
) -> Fit:
    """The mixture of formats that fits ``target`` and is expected to lose the least.

    ``moments`` are the inputs'; those of gradients are kept in ``directory``. Raises InputError where none fits.
    """
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
    windows = (
        held_out if len(held_out) else calibration.windows[: max(1, _MEASURED_TOKENS // calibration.windows.shape[1])]
    )
    rounded = ShardsSource(Shards(out))
    with counted("Measuring", config.num_layers) as advance:
        found = find_calibrator().measure_divergence(source, rounded, config, windows, advance)
    where = "that follow in the text" if len(held_out) else "that it was calibrated on, which flatters it"
    return f"Measured over {windows.numel()} tokens {where}: {found.mean:.4f} +- {found.error:.4f} nats per token."

"""What llama-quantize --calibrate runs: a source's layers over windows of a text (``quantize.calibration.calibrator``).

The layers run one after the other, over all windows each, so that one layer's inputs and outputs are in memory, and
blocks of its weights. What is known after a layer is kept on the disk until all are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from converters.console.errors import InputError
from converters.console.progress import Advance
from converters.files.parallel import every_core
from converters.model.config import ModelConfig
from converters.sources.source import TensorSource
from quantize.calibration.calibrator import WINDOW
from quantize.calibration.feedback import Feedback
from quantize.calibration.moments import Moments
from quantize.formats.integers import Integers
from quantize.formats.weight_format import Encoded, RowErrors
from quantize.shards.scheme import Scheme
from runtime.calibrate.blocks import Blocks, SourceWeight, StreamedLinear
from runtime.calibrate.fit import candidates, check_fit, fit
from runtime.calibrate.measure import measure_divergence
from runtime.calibrate.scratch import Scratch
from runtime.calibrate.sensitivity import gather_gradients
from runtime.run.text import codec_of
from runtime.run.token_files import TokenFiles

__all__ = [  # what the entry point promises
    "candidates",
    "check_fit",
    "clear",
    "feedback_layers",
    "fit",
    "gather_gradients",
    "gather_moments",
    "measure_divergence",
    "read_windows",
]

_AT_ONCE = 1 << 28  # bytes of a layer's widest activations at once: several such tensors are needed


_WANTED = (
    "Give --calibrate text of the kind that the model will be used for, of 8,192 tokens or more, and not what it will "
    "be measured on (.txt, or token ids as .json or .npy)."
)


def read_windows(
    source: TensorSource, where: Path, paths: Sequence[Path], tokens: int, after: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first so many ``tokens`` of the texts in windows [N, T] of up to WINDOW, and as many windows as there are of
    the ``after`` tokens that follow; what is over is left out.

    ``where`` is what messages call the source. Raises InputError for what can't be read.
    """
    files = TokenFiles(paths, "--calibrate", "--calibration-tokens", _WANTED)
    files.check()
    config = source.config
    codec = codec_of(source.auxiliary_files(), where, config.vocab_size, "token ids")
    found = files.read(tokens, codec, config.vocab_size, where, after)
    if not found:
        raise InputError(_WANTED)
    length = min(WINDOW, len(found), tokens)
    while not config.holds_context(length):
        length //= 2
    first, rest = found[:tokens], found[tokens:]
    return tuple(torch.tensor(each[: len(each) // length * length]).view(-1, length) for each in (first, rest))


def gather_moments(
    source: TensorSource, config: ModelConfig, windows: torch.Tensor, scratch: Path, key: str, advance: Advance
) -> Moments:
    """The mean square of every input of every linear of the layers, over windows of tokens [N, T].

    ``scratch`` is a folder for what a later run with the same ``key`` can go on from. ``advance`` is told layers.
    """
    with torch.no_grad(), every_core():
        return _gather(source, config, windows, Scratch(scratch, key), advance)


def _gather(
    source: TensorSource, config: ModelConfig, windows: torch.Tensor, scratch: Scratch, advance: Advance
) -> Moments:
    blocks = Blocks(source, config, windows.shape[1])
    done, kept = scratch.last(config.num_layers) or (-1, {})
    hidden = kept.pop("hidden") if kept else blocks.embed(windows)
    found = kept  # float32 [in] by weight
    advance(done + 1)
    for number in range(done + 1, config.num_layers):
        sums: dict[str, torch.Tensor] = {}

        def seen(name: str, x: torch.Tensor, sums: dict[str, torch.Tensor] = sums) -> None:
            squares = x.flatten(0, -2).square().sum(0).double()
            sums[name] = sums[name] + squares if name in sums else squares

        layer = blocks.layer(number, lambda weight, seen=seen: StreamedLinear(weight, seen))
        for part in hidden.split(_windows_at_once(config, windows.shape[1])):
            part.copy_(layer(part))
        found |= {name: (squares / windows.numel()).float() for name, squares in sums.items()}
        scratch.save(number, {"hidden": hidden, **found})
        advance(1)
    return Moments(found)


def _windows_at_once(config: ModelConfig, length: int) -> int:
    return max(1, _AT_ONCE // (4 * length * max(config.intermediate_size, config.hidden_size)))


def clear(scratch: Path, key: str, config: ModelConfig) -> None:
    """Remove what ``gather_moments`` left in ``scratch``."""
    Scratch(scratch, key).clear(config.num_layers)


def feedback_layers(
    source: TensorSource, config: ModelConfig, scheme: Scheme, windows: torch.Tensor, scratch: Path, key: str
) -> FeedbackLayers:
    """The layers of a source, to be rounded by ``scheme`` for windows of tokens [N, T].

    ``scratch`` is a folder for what a later run with the same ``key`` can go on from.
    """
    return FeedbackLayers(source, config, scheme, windows, Scratch(scratch, key))


class FeedbackLayers:
    """The layers' weights rounded with error feedback, one layer after the other.

    Two streams run through the layers: the windows as the model computes them, and as the layers that are rounded
    already do. A weight is rounded for its inputs in the second, to give what it gives in the first.
    """

    def __init__(
        self, source: TensorSource, config: ModelConfig, scheme: Scheme, windows: torch.Tensor, scratch: Scratch
    ) -> None:
        self._config, self._scheme, self._windows = config, scheme, windows
        self._blocks = Blocks(source, config, windows.shape[1])
        self._scratch = scratch
        self._at = -1  # the layer that the streams have come through
        self._streams: tuple[torch.Tensor, torch.Tensor] | None = None

    def encoded(self, number: int) -> dict[str, Encoded]:
        """The layer's weights that are in a format with integers, by name. Layers are asked for in ascending order."""
        with torch.no_grad(), every_core():
            exact, rounded = self._through(number)
            found: dict[str, Encoded] = {}
            self._streams = self._run(number, exact, rounded, found)
            self._at = number
            self._scratch.save(number, dict(zip(("exact", "rounded"), self._streams, strict=True)))
            return found

    def clear(self) -> None:
        """Remove what is kept on the disk."""
        self._scratch.clear(self._config.num_layers)

    def _through(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The streams [N, T, E] that enter the layer."""
        if self._streams is None:
            done, kept = self._scratch.last(number) or (-1, {})
            if kept:
                self._streams = kept["exact"], kept["rounded"]
            else:
                hidden = self._blocks.embed(self._windows)
                self._streams = hidden, hidden
            self._at = done
        while self._at < number - 1:
            self._at += 1
            self._streams = self._run(self._at, *self._streams, {})
        return self._streams

    def _run(
        self, number: int, exact: torch.Tensor, rounded: torch.Tensor, found: dict[str, Encoded]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams after the layer; ``found`` gets its weights."""
        inputs: dict[str, torch.Tensor] = {}
        alike = exact is rounded

        def seen(name: str, x: torch.Tensor) -> None:
            inputs[name] = x.flatten(0, -2)

        after = self._blocks.layer(number, lambda weight: StreamedLinear(weight, seen))(exact)
        linears = _FeedbackLinears(self._config, self._scheme, inputs, found)
        return after, self._blocks.layer(number, linears.make)(exact if alike else rounded)


class _FeedbackLinears:
    """Makes a layer's linears, which are rounded when they are given their inputs."""

    def __init__(
        self, config: ModelConfig, scheme: Scheme, exact: dict[str, torch.Tensor], found: dict[str, Encoded]
    ) -> None:
        self._config, self._scheme, self._exact, self._found = config, scheme, exact, found
        self._last: tuple[torch.Tensor, int | None, Feedback] | None = None

    def make(self, weight: SourceWeight) -> torch.nn.Module:
        form = self._scheme.format_named(weight.name, self._config)
        return _FeedbackLinear(weight, form, self) if isinstance(form, Integers) else StreamedLinear(weight)

    def feedback(self, name: str, x: torch.Tensor, group: int | None) -> Feedback:
        """For the inputs x [..., in] of a weight in groups of so many; weights that are alike in both share it."""
        exact = self._exact.pop(name)
        if self._last is None or self._last[0] is not x or self._last[1] != group:
            self._last = None  # before the next is made
            inputs = x.flatten(0, -2)
            exact_or_none = None if torch.equal(inputs, exact) else exact
            self._last = x, group, Feedback.of(inputs, exact_or_none, group, name)
        return self._last[2]

    def keep(self, name: str, parts: Sequence[Encoded]) -> None:
        self._found[name] = joined(parts)


class _FeedbackLinear(torch.nn.Module):
    """y = x W^T with a weight that is rounded for these x first."""

    def __init__(self, weight: SourceWeight, form: Integers, linears: _FeedbackLinears) -> None:
        super().__init__()
        self._weight, self._form, self._linears = weight, form, linears

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        feedback = self._linears.feedback(self._weight.name, x, self._form.group_size)
        parts, y = [], []
        for _, _, rows in self._weight.blocks():
            parts.append(feedback.encode(rows, self._form))
            y.append(x @ self._form.decode(parts[-1].tensors).T)
        self._linears.keep(self._weight.name, parts)
        return torch.cat(y, dim=-1)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Encoded blocks of rows as one."""
    tensors = {suffix: torch.cat([part.tensors[suffix] for part in parts]) for suffix in parts[0].tensors}
    errors = zip(*(part.errors for part in parts), strict=True)
    return Encoded(tensors, RowErrors(*map(torch.cat, errors)))

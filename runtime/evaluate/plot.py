"""Drawing an evaluation: the divergence by the place in the window and, if asked for, by the number of layers."""

from __future__ import annotations

import io
import textwrap
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from converters.console.units import plural
from runtime.evaluate.report import Evaluation
from runtime.evaluate.statistics import Positions

_DPI = 150
_COLOR = "#1f77b4"
_MOST_BINS = 32
_WIDEST_LINEAR = 20  # above this ratio of largest to smallest, the axis of the divergence is logarithmic
_CAPTION_WIDTH = {1: 110, 2: 160}  # characters, by the number of panels


def draw(evaluation: Evaluation) -> bytes:
    """A picture as PNG of an evaluation that has a reference."""
    panels = 1 if evaluation.by_layer is None else 2
    drawing = Figure(figsize=(4 + 4 * panels, 5), dpi=_DPI, layout="constrained")
    axes = np.atleast_1d(drawing.subplots(1, panels))
    _by_place(axes[0], evaluation.positions)
    if evaluation.by_layer is not None:
        _by_layer(axes[1], evaluation.by_layer)
    drawing.suptitle(f"Divergence of {evaluation.weights} from {evaluation.against_weights} weights", fontsize=13)
    drawing.supxlabel(
        "\n".join(textwrap.wrap(_caption(evaluation), _CAPTION_WIDTH[panels])), fontsize=8, color="#444444"
    )
    file = io.BytesIO()
    drawing.savefig(file, format="png")
    return file.getvalue()


def by_place(positions: Positions) -> np.ndarray:
    """Bins of following places in the window, [bins, 4]: the first and the last place of each, and the mean and the
    90% quantile of the KL of the positions there.
    """
    last = int(positions.place.max())
    edges = np.unique(np.linspace(1, last + 1, min(_MOST_BINS, last) + 1).round().astype(int))
    rows = []
    for first, end in pairwise(edges):
        kl = positions.kl[(positions.place >= first) & (positions.place < end)]
        rows.append((first, end - 1, kl.mean(), np.quantile(kl, 0.9)))
    return np.array(rows)


def _by_place(axes: Axes, positions: Positions) -> None:
    bins = by_place(positions)
    middle = bins[:, :2].mean(axis=1)
    axes.fill_between(middle, 0, bins[:, 3], color=_COLOR, alpha=0.2, linewidth=0, label="90% of positions are below")
    axes.plot(middle, bins[:, 2], color=_COLOR, marker="o", markersize=3, label="mean")
    axes.set_xlim(0, bins[-1, 1] + 1)
    axes.set_ylim(0, 1.1 * bins[:, 2:].max() or 1)
    places = bins[0, 1] - bins[0, 0] + 1
    axes.set_xlabel("place of the token in the window" + (f" (in bins of {places:.0f})" if places > 1 else ""))
    axes.set_ylabel("KL (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)


def _by_layer(axes: Axes, divergences: list[float]) -> None:
    layers = np.arange(1, len(divergences) + 1)
    logarithmic = min(divergences) > 0 and max(divergences) > _WIDEST_LINEAR * min(divergences)
    axes.plot(layers, divergences, color=_COLOR, marker="o", markersize=3)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(divergences) or 1)
    axes.set_xlabel("both models cut after so many layers")
    axes.set_ylabel("mean KL (nats per token" + (", logarithmic)" if logarithmic else ")"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _caption(evaluation: Evaluation) -> str:
    found = evaluation.divergence
    return (
        f"{evaluation.model}. {plural(evaluation.tokens, 'token')} in {plural(evaluation.windows, 'window')} of "
        f"{evaluation.window}, {evaluation.dtype} activations. Mean KL {found.kl.value:.3g} nats per token, same first "
        f"token at {found.same_first:.1%} of positions, ratio of perplexities {found.ratio.value:.4f}."
    )

"""The mean square of every input of a model's linears over a text, in a file of its own that serves every format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.console.errors import InputError
from converters.files.row_blocks import CACHED_ELEMENTS, row_blocks
from converters.model.config import ModelConfig
from quantize.formats.weight_format import Encoded, RowErrors, WeightFormat

if TYPE_CHECKING:
    import torch

FILE_NAME = "moments.safetensors"
GRADIENTS = "gradients.safetensors"
_ABOUT = "llama-quantize"  # the header's entry that says what the file holds
_KIND = "mean squares of linears"


@dataclass(frozen=True)
class Moments:
    """By the name of a linear's weight [out, in], the mean square of each input: float32 [in]; or of gradients by each
    of its outputs: float32 [out].
    """

    by_weight: Mapping[str, torch.Tensor]

    def to_file(self, about: Mapping[str, str]) -> bytes:
        """The content of the file; ``about`` is put into its header."""
        from safetensors.torch import save

        # In one entry: the library writes several in an order of its own, which differs from time to time.
        return save(dict(sorted(self.by_weight.items())), {_ABOUT: json.dumps({"kind": _KIND, **about})})


def read_moments(path: Path, config: ModelConfig, of_inputs: bool = True) -> Moments:
    """Read the file and hold it against the linears' inputs, or outputs. Raises InputError for another model's."""
    from safetensors import SafetensorError, safe_open

    from quantize.shards.scheme import choices

    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get(_ABOUT, "")
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} can't be read ({error}). Take it away, and calibrate again.") from None
    wanted = {name: each.shape[1 if of_inputs else 0] for name, each in choices(config).items() if each.in_block}
    if not _is_kind(about) or any(name not in found or found[name].shape != (width,) for name, width in wanted.items()):
        raise InputError(f"{path} doesn't hold the moments of {config.name}. Take it away, and calibrate again.")
    return Moments({name: found[name] for name in wanted})


def _is_kind(about: str) -> bool:
    try:
        return json.loads(about)["kind"] == _KIND
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def with_output_errors(encoded: Encoded, weight: torch.Tensor, form: WeightFormat, moments: torch.Tensor) -> RowErrors:
    """The errors of encoded rows of a ``weight`` [n, in], with those of their outputs as far as ``moments`` [in] tell.

    Inputs are taken to be independent of each other.
    """
    import torch

    rows, width = weight.shape
    sums = torch.empty(2, rows, dtype=torch.float64)
    for start, stop in row_blocks(0, rows, width, CACHED_ELEMENTS):
        exact = weight[start:stop].double()
        some = {suffix: tensor[start:stop] for suffix, tensor in encoded.tensors.items()}
        difference = form.decode(some).double().sub_(exact)
        # A product with a vector would add in an order that depends on the number of rows.
        for place, values in enumerate((difference, exact)):
            sums[place, start:stop] = values.square_().mul_(moments).sum(1)
    return RowErrors(*encoded.errors[:3], *sums)

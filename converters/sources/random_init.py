"""Random weights that follow from a seed alone, so that any rows of any tensor can be made without the others.

Value i of a tensor is the quantile of a normal distribution that 16 random bits select: lane i % 4 (from the low end)
of the 64-bit word i // 4 of numpy's Philox stream (Salmon et al. 2011, a counter-based generator), keyed by the first
16 bytes of sha256("<seed>:<tensor name>") and starting at counter 0. Norm weights are 1, their biases 0.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from converters.console.errors import InputError
from converters.files.json_file import read_json
from converters.files.row_blocks import CACHED_ELEMENTS, row_blocks
from converters.model.config import ModelConfig
from converters.model.families.hf_config import read_config, to_hf
from converters.model.parameters import parameters

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE_NAME = "random_init.json"
FORMAT_VERSION = 1
STD = 0.02
DISTRIBUTION = {"name": "normal", "mean": 0.0, "std": STD, "bits": 16, "generator": "philox4x64-10", "norms": 1.0}
_WORDS_PER_COUNTER = 4
_LANES = 4  # 16-bit values in a 64-bit word


class RandomSource:
    """Random weights of a configuration, in its dtype, as a TensorSource."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._parameters = {parameter.name: parameter for parameter in parameters(config)}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        parameter = self._parameters[name]
        shape = (stop - start, *parameter.shape[1:])
        dtype = getattr(torch, self.config.dtype)
        if parameter.row.fill is not None:
            return torch.full(shape, parameter.row.fill, dtype=dtype)
        values = _draw(self.seed, name, start * parameter.width, stop * parameter.width, _quantiles(self.config.dtype))
        return torch.from_numpy(values).view(dtype).view(shape)

    def default_dtype(self) -> str:
        return self.config.dtype

    def fingerprint(self) -> str:
        described = json.dumps([to_hf(self.config), random_init_record(self.seed)], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def files(self) -> list[Path]:
        return []

    def auxiliary_files(self) -> dict[str, bytes]:
        return {}


def random_init_record(seed: int) -> dict[str, Any]:
    """The content of random_init.json: with config.json, all that is needed to make the weights again."""
    return {"format_version": FORMAT_VERSION, "seed": seed, "distribution": DISTRIBUTION}


def open_random_init(directory: Path) -> RandomSource:
    """The weights that a directory's random_init.json and config.json describe.

    Raises InputError where either is damaged or of another version.
    """
    path = directory / FILE_NAME
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path} is not of format version {FORMAT_VERSION}; make it again with this llama-convert.")
    seed = record.get("seed")
    if record.get("distribution") != DISTRIBUTION or type(seed) is not int or seed < 0:
        raise InputError(f"{path} describes weights that this version can't make; make it again with llama-convert.")
    return RandomSource(read_config(directory / "config.json"), seed)


def _draw(seed: int, name: str, start: int, stop: int, table: np.ndarray) -> np.ndarray:
    """Values [start, stop) of a tensor, looked up in ``table`` in pieces that stay in the processor's cache."""
    import numpy as np

    values = np.empty(stop - start, dtype=table.dtype)
    for first, last in row_blocks(start, stop, 1, CACHED_ELEMENTS):
        bits = _random_bits(seed, name, first, last)
        # numpy's take is the fastest way to look up 16 bits; "clip" saves it a check of bounds.
        np.take(table, bits, mode="clip", out=values[first - start : last - start])
    return values


def _random_bits(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """The 16-bit draws [start, stop) of a tensor, as uint16."""
    import numpy as np

    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], dtype="<u8")
    first_counter = start // (_LANES * _WORDS_PER_COUNTER)
    skipped = start - first_counter * _LANES * _WORDS_PER_COUNTER
    words = -(-(stop - start + skipped) // _LANES)
    raw = np.random.Philox(key=key, counter=[first_counter, 0, 0, 0]).random_raw(words)
    return raw.astype("<u8", copy=False).view("<u2")[skipped : skipped + stop - start]


@lru_cache(maxsize=3)
def _quantiles(dtype: str) -> np.ndarray:
    """The 65,536 values that 16 random bits select from, as bit patterns: quantiles at the middle of equal slices."""
    import torch

    normal = NormalDist(0.0, STD)
    upper = [normal.inv_cdf((k + 0.5) / 65536) for k in range(32768, 65536)]
    values = [-value for value in reversed(upper)] + upper
    table = torch.tensor(values, dtype=torch.float64).to(torch.float32).to(getattr(torch, dtype))
    return table.view(torch.int16 if table.itemsize == 2 else torch.int32).numpy()

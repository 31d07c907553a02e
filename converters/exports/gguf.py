"""A model as a GGUF file for llama.cpp: types, metadata, and values row block by row block in its order of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from converters.console.errors import InputError
from converters.console.notes import note
from converters.exports.gguf_blocks import LARGEST_HALF, QUANTIZED, blocks_of_integers, quantized_blocks, rounding
from converters.exports.gguf_metadata import model_metadata, rope_divisors
from converters.exports.gguf_types import F16, Planned, plan_types
from converters.files.row_blocks import row_blocks
from converters.formats.finite import check_finite
from converters.formats.gguf_file import GGUFFile, GGUFSpec
from converters.model.config import ModelConfig
from converters.model.families.family import GGUFForm
from converters.model.families.registry import family_of
from converters.model.parameters import Parameter
from converters.sources.codes import SCALE, VALUES, ZERO_POINTS, Coding, PartsSource
from converters.sources.gguf.rope import TABLE as ROPE_TABLE
from converters.sources.interleaved_rows import INTERLEAVED, interleaved_rows
from converters.sources.source import TensorSource
from converters.tokenizers.to_gguf import tokenizer_metadata

if TYPE_CHECKING:
    import torch

_Read = Callable[[str, int, int], "torch.Tensor"]
FILE_NAME = "model.gguf"


@dataclass(frozen=True)
class GGUFExport:
    """The file of a ``source``; ``wanted`` is one of gguf_types.TYPES, or None: by what the source holds.

    Raises InputError for an architecture that GGUF doesn't know, and for a tokenizer that llama.cpp doesn't have.
    """

    source: TensorSource
    config: ModelConfig
    wanted: str | None = None

    def __post_init__(self) -> None:
        family = family_of(self.config.architecture)
        if family.gguf is None:
            raise InputError(
                f"--format gguf can't hold {self.config.name}: GGUF knows no {family.title}. Leave --format out."
            )

    @cached_property
    def file(self) -> GGUFFile:
        counts = Counter[str]()
        for each in self._planned.values():
            counts[each.type] += each.parameter.elements
        metadata = model_metadata(self.config, self._form, counts.most_common(1)[0][0])
        metadata |= tokenizer_metadata(self.source.auxiliary_files(), self.config)
        tensors = [GGUFSpec(name, each.type, each.parameter.shape) for name, each in self._planned.items()]
        if self._divisors:
            tensors.append(GGUFSpec(ROPE_TABLE, "F32", (len(self._divisors),)))
        return GGUFFile(FILE_NAME, metadata, tuple(tensors))

    @property
    def title(self) -> str:
        """The types of its matrices, that of most weights first."""
        types = Counter[str]()
        for each in self._planned.values():
            if len(each.parameter.shape) == 2:
                types[each.type] += each.parameter.elements
        return " and ".join(name for name, _ in types.most_common())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor by its name in the file, as they are written there."""
        import torch

        if name == ROPE_TABLE:
            return torch.tensor(self._divisors[start:stop], dtype=torch.float32)
        planned = self._planned[name]
        if planned.code:
            values = self._code(planned.parameter, VALUES, start, stop)
            if planned.code.zero_points:  # of 4 bits: the difference fits into 8
                zeros = self._code(planned.parameter, ZERO_POINTS, start, stop)
                values = values - zeros.repeat_interleave(values.shape[1] // zeros.shape[1], dim=1)
            return blocks_of_integers(planned.type, values, self._code(planned.parameter, SCALE, start, stop))
        values = self._in_order(planned.parameter, start, stop, self.source.rows)
        if planned.type == F16 and bool((values.abs() > LARGEST_HALF).any()):
            raise InputError(
                f"{planned.parameter.name} holds values that are too large for float16. Give another --gguf-type, or "
                "--dtype bfloat16."
            )
        if planned.type not in QUANTIZED:
            return values
        check_finite(values, planned.parameter.name)
        return quantized_blocks(planned.type, values)

    def check_scales(self) -> None:
        """Note by how much float16 changes scales that go into blocks as they are.

        Reads them all. Raises InputError, naming the weight, where one is beyond float16's range.
        """
        inexact = total = 0
        worst = 0.0
        for each in self._planned.values():
            if not each.code:
                continue
            rows, inputs = each.parameter.shape
            groups = each.code.groups(inputs)
            for start, stop in row_blocks(0, rows, groups):
                count, change = rounding(self._source.part_rows(each.parameter.name, SCALE, start, stop))
                if change == float("inf"):
                    raise InputError(
                        f"{each.parameter.name} has a scale that float16, and so GGUF's {each.type}, doesn't hold. "
                        "Write it with --gguf-type F16, or quantize the checkpoint anew."
                    )
                inexact, worst, total = inexact + count, max(worst, change), total + (stop - start) * groups
        if inexact:
            note(f"{inexact} of {total} scales are no float16 and are rounded to one, by {worst:.2g} of it at most.")

    @property
    def _form(self) -> GGUFForm:
        return family_of(self.config.architecture).gguf

    @property
    def _source(self) -> PartsSource:
        return self.source

    @cached_property
    def _divisors(self) -> list[float] | None:
        return rope_divisors(self.config)

    @cached_property
    def _planned(self) -> dict[str, Planned]:
        """By the tensors' names in the file."""
        codes: dict[str, Coding] = {}
        if isinstance(self.source, PartsSource):
            codes = self.source.codings(self.config)
        names = {hf: name for name, hf in self._form.model_names.items()}
        block_names = {hf: name for name, hf in self._form.block_names.items()}
        planned = {}
        for each in plan_types(self.config, codes, self.wanted):
            name = each.parameter.name
            if each.parameter.in_block:
                layer = each.parameter.prefix.split(".")[-2]
                inner, _, kind = each.parameter.row.name.rpartition(".")
                planned[f"blk.{layer}.{block_names[inner]}.{kind}"] = each
            else:
                planned[names[name]] = each
        return planned

    def _code(self, parameter: Parameter, part: str, start: int, stop: int) -> torch.Tensor:
        return self._in_order(
            parameter, start, stop, lambda name, first, last: self._source.part_rows(name, part, first, last)
        )

    def _in_order(self, parameter: Parameter, start: int, stop: int, read: _Read) -> torch.Tensor:
        """Rows [start, stop) in the file's order: those of q and k are interleaved."""
        import numpy as np

        if not (self._form.interleaved and parameter.name.endswith(INTERLEAVED)):
            return read(parameter.name, start, stop)
        head_dim = self.config.head_dim
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim  # whole heads
        places = np.argsort(interleaved_rows(first, last, head_dim))
        return read(parameter.name, first, last)[places[start - first : stop - first]]

"""The table of weight formats, by the names that command lines and shards.json have for them."""

from __future__ import annotations

from quantize.formats.floating import Floating
from quantize.formats.int8 import Int8
from quantize.formats.weight_format import WeightFormat

FORMATS: dict[str, WeightFormat] = {each.name: each for each in (Int8(), Floating("bfloat16"))}

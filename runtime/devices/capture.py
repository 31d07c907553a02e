"""Capturing a function as one graph with torch.compile, once per shape of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SHAPES = 4096  # torch gives up on a function after 8 shapes, 256 in all; buckets and sessions have one each


def capture(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """``function`` compiled by torch.compile's ``backend`` as a single graph; raises where a part can't be captured."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _SHAPES)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

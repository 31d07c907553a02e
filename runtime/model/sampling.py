"""Choosing every row's next token from its logits, on the device. Settings are tensors, so none needs a compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_COLDEST = 1e-4  # at or below this the largest logit is taken: divided by less, logits would not stay finite
_ALL = 2**31 - 1  # more tokens than any vocabulary has


@dataclass(frozen=True)
class Sampling:
    """How to choose: a temperature of 0 takes the largest logit. ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def controls(self, batch_size: int, slots: int) -> Controls:
        """Host tensors for ``sample``. The random numbers come from the host's generator: equal on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        return Controls(
            torch.tensor([self.temperature], dtype=torch.float32),
            torch.tensor([min(self.top_k, _ALL)]),
            torch.tensor([self.top_p], dtype=torch.float32),
            torch.rand(slots, batch_size, generator=generator),
        )


class Controls(NamedTuple):
    """The settings as tensors; ``noise`` holds a uniform number in [0, 1) for each cache slot and row."""

    temperature: Tensor  # [1]
    top_k: Tensor  # [1]
    top_p: Tensor  # [1]
    noise: Tensor  # [S, B]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Tokens [B, 1] drawn from logits [B, V] with noise [B], one uniform number in [0, 1) for each row.

    One multinomial draw by inversion: the token is where the cumulative probability first exceeds the noise. The
    ``top_k`` most probable tokens are kept, and of these the fewest whose share of the probability reaches ``top_p``
    (Holtzman et al. 2020), at least one.
    """
    logits = logits.float()
    ordered, tokens = (logits / temperature.clamp(min=_COLDEST)).sort(dim=-1, descending=True)  # [B, V]
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    probable = ordered.softmax(-1) * ((ranks < top_k) | (top_k < 1))
    before = probable.cumsum(-1) - probable
    kept = probable * ((before < top_p * probable.sum(-1, keepdim=True)) | (ranks < 1))
    reached = kept.cumsum(-1)
    rank = (reached <= noise[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    # Rounding may leave the noise at the very end of the sum: then the last kept token is meant.
    rank = torch.minimum(rank, (kept > 0).sum(-1, keepdim=True) - 1)
    return torch.where(temperature > _COLDEST, tokens.gather(-1, rank), logits.argmax(-1, keepdim=True))

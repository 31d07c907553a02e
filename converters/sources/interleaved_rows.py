"""The order of a Q or K projection's rows under interleaved rotary embeddings, which Meta's files and GGUF use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

INTERLEAVED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # the names of such tensors end so


def interleaved_rows(start: int, stop: int, head_dim: int) -> np.ndarray:
    """The stored positions of rows [start, stop) in Hugging Face's order of a Q or K projection: int64 [stop - start].

    Rotary embeddings turn pairs of a head's dimensions. Hugging Face pairs row i with row i + head_dim / 2
    (rotate-half); Meta's files and GGUF keep the two side by side.
    """
    import numpy as np

    head, row = np.divmod(np.arange(start, stop), head_dim)
    half, pair = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * pair + half

"""What sets one architecture of decoders apart from another, as data: the kinds of its parts, the names of its tensors.

The parameter table (parameters.py) and the decoder are built from this. Each kind of part is a member of an enum here
and a class of the decoder: in norms.py, positions.py or feed_forward.py of runtime/model/parts/.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Norm(Enum):
    """How activations are normalized: the tensors that it learns, each with the value that changes nothing."""

    RMS = (("weight", 1.0),)  # root mean square
    LAYER = (("weight", 1.0), ("bias", 0.0))  # layer normalization


class Positions(Enum):
    """How a token learns its position."""

    ROTARY = "rotary"  # queries and keys are rotated (rope.py); nothing is stored
    LEARNED = "learned"  # a table of vectors, added to the tokens' own


class FeedForward(Enum):
    """The layer behind attention, of ``feed_forward_in`` linears and the one ``feed_forward_out``."""

    SWIGLU = "gated by SiLU"  # out(silu(first(x)) * second(x))
    RELU = "ReLU"  # out(relu(first(x)))


@dataclass(frozen=True)
class Architecture:
    """The architecture of a family of decoders, or of one of its variants.

    Names are those of Hugging Face, without ``.weight``.
    """

    model_type: str  # of config.json as this tool writes it; variants share it
    title: str  # for people
    prefix: str  # before the name of every tensor but the output head's
    norm: Norm
    positions: Positions
    feed_forward: FeedForward
    attention_norm: str
    attention_out: str  # within self_attn, beside q_proj, k_proj and v_proj
    feed_forward_norm: str
    feed_forward_in: tuple[str, ...]
    feed_forward_out: str
    final_norm: str | None  # None: the last layer's output goes to the head as it is
    norm_first: bool = True  # normalize what goes into attention and feed-forward layer; else the sums behind them
    biases: bool = False  # of the blocks' linears
    norm_weights: bool = True  # whether norms have learned weights (and biases) at all
    projects: bool = False  # whether some have an embedding of another width, with linears from it and to the head
    position_offset: int = 0  # of learned positions: rows of the table before the first position's

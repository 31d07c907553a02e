"""What sets one family of decoders apart from another, as data: the kinds of its parts, the names of its tensors.

The parameter table (layout.py) and the decoder are built from this; so a model of another family needs no code of its
own, unless it has a kind of part that none had before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Norm(Enum):
    """How activations are normalized."""

    RMS = "root mean square"  # one weight
    LAYER = "layer normalization"  # a weight and a bias


class Positions(Enum):
    """How a token learns its position."""

    ROTARY = "rotary"  # queries and keys are turned (rope.py); nothing is stored
    LEARNED = "learned"  # a table of vectors, added to the tokens' own


class FeedForward(Enum):
    """The layer behind attention, of ``feed_forward_in`` linears and the one ``feed_forward_out``."""

    SWIGLU = "gated by SiLU"  # out(silu(first(x)) * second(x))
    RELU = "ReLU"  # out(relu(first(x)))


@dataclass(frozen=True)
class Architecture:
    """A family of decoders, or one of its variants. Names are those of Hugging Face, without ``.weight``."""

    model_type: str  # of config.json; variants share it
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


LLAMA = Architecture(
    model_type="llama",
    title="LLaMA",
    prefix="model.",
    norm=Norm.RMS,
    positions=Positions.ROTARY,
    feed_forward=FeedForward.SWIGLU,
    attention_norm="input_layernorm",
    attention_out="o_proj",
    feed_forward_norm="post_attention_layernorm",
    feed_forward_in=("mlp.gate_proj", "mlp.up_proj"),
    feed_forward_out="mlp.down_proj",
    final_norm="norm",
)
# Zhang et al. 2022.
OPT = Architecture(
    model_type="opt",
    title="OPT",
    prefix="model.decoder.",
    norm=Norm.LAYER,
    positions=Positions.LEARNED,
    feed_forward=FeedForward.RELU,
    attention_norm="self_attn_layer_norm",
    attention_out="out_proj",
    feed_forward_norm="final_layer_norm",  # a block's; the one behind all blocks has the same name without a layer
    feed_forward_in=("fc1",),
    feed_forward_out="fc2",
    final_norm="final_layer_norm",
    biases=True,
    projects=True,
    position_offset=2,
)
OPT_POST_NORM = replace(OPT, norm_first=False, final_norm=None)  # the 350M model
FAMILIES = {family.model_type: family for family in (LLAMA, OPT)}

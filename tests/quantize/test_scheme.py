"""Schemes: the one form of a mixture, its words, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from models import SMALL

from converters.console.errors import InputError
from quantize.shards.scheme import Scheme, choices, mixture
from quantize.shards.stored import stored_parameters

LINEARS = [name for name in choices(SMALL) if name != "lm_head.weight"]
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_what_can_be_chosen() -> None:
    assert len(LINEARS) == 7 * SMALL.num_layers
    assert list(choices(SMALL))[-1] == "lm_head.weight"
    assert list(choices(replace(SMALL, tie_word_embeddings=True))) == LINEARS


def test_all_in_one_format_is_that_scheme() -> None:
    assert mixture(SMALL, dict.fromkeys(LINEARS, "int8")) == Scheme("int8")
    assert mixture(SMALL, dict.fromkeys([*LINEARS, "lm_head.weight"], "int8")) == Scheme("int8", quantize_lm_head=True)
    assert mixture(SMALL, dict.fromkeys(LINEARS, "unquantized")) == Scheme("bf16")
    assert Scheme("int8", overrides=((DOWN, "int8"),)) == Scheme("int8")
    assert mixture(SMALL, dict.fromkeys(LINEARS, "int8") | {"lm_head.weight": "bf16"}) == Scheme("int8")


def test_a_mixture_has_one_form() -> None:
    formats = dict.fromkeys(LINEARS, "int8") | {DOWN: "bf16", LINEARS[0]: "fp8", "lm_head.weight": "fp8"}
    scheme = mixture(SMALL, formats)
    backwards = mixture(SMALL, dict(reversed(formats.items())))
    assert (backwards, repr(backwards), hash(backwards)) == (scheme, repr(scheme), hash(scheme))
    assert scheme == Scheme("int8", True, (("lm_head.weight", "fp8"), (DOWN, "unquantized"), (LINEARS[0], "fp8")))
    assert scheme != Scheme("int8", True, (("lm_head.weight", "fp8"), (DOWN, "unquantized")))
    assert (scheme.name, scheme.default, [each.name for each in scheme.formats]) == ("mixed", "int8", ["int8", "fp8"])
    assert {each.name: each.format.name for each in stored_parameters(SMALL, scheme)} == {
        each.name: formats.get(each.name, "bf16") for each in stored_parameters(SMALL, scheme)
    }


def test_the_model_s_own_dtype_is_that_of_what_is_not_quantized() -> None:
    scheme = mixture(SMALL, dict.fromkeys(LINEARS, "int8") | {DOWN: "bf16"})
    for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
        config = SMALL.with_dtype(dtype)
        assert scheme.floating_dtype(config) == dtype
        [down] = [each for each in stored_parameters(config, scheme) if each.name == DOWN]
        assert down.format.name == name
        assert scheme.title(config).endswith(f"{name} 10%)")


def test_layers_that_are_cut_fall_away() -> None:
    scheme, one = mixture(SMALL, dict.fromkeys(LINEARS, "int8") | {DOWN: "bf16", LINEARS[0]: "fp8"}), SMALL.cut(1)
    assert scheme.cut(SMALL) == scheme
    assert scheme.cut(one) == Scheme("int8", overrides=((LINEARS[0], "fp8"),))
    assert stored_parameters(one, scheme) == stored_parameters(one, scheme.cut(one))
    assert mixture(SMALL, dict.fromkeys(LINEARS, "int8") | {DOWN: "bf16"}).cut(one) == Scheme("int8")


def test_titles() -> None:
    """Shares of weights: a layer's q and o have 256, k and v 128, gate, up and down 384; lm_head has 800."""
    assert Scheme("int8").title(SMALL) == "int8"
    formats = dict.fromkeys(LINEARS, "int8") | {DOWN: "int4", LINEARS[1]: "unquantized"}
    assert mixture(SMALL, formats).title(SMALL) == "mixed (int8 87%, int4 10%, bf16 3%)"
    assert mixture(SMALL, formats | {"lm_head.weight": "int4"}).title(SMALL) == "mixed (int8 72%, int4 26%, bf16 3%)"
    deep = replace(SMALL, num_layers=40)
    formats = dict.fromkeys([name for name in choices(deep) if name != "lm_head.weight"], "int8") | {DOWN: "int4"}
    assert mixture(deep, formats).title(deep) == "mixed (int8 99%, int4 <1%)"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda formats: formats.pop(DOWN), f"{DOWN} of small is given no format"),
        (lambda formats: formats.update({DOWN: "int5"}), "'int5' is no format; give one of int8, "),
        (lambda formats: formats.update({"model.norm.weight": "int8"}), "'model.norm.weight' is no linear of small"),
        (
            lambda formats: formats.update({DOWN.replace("1", "2"): "int8"}),
            "layers.2.mlp.down_proj.weight' is no linear",
        ),
        (lambda formats: formats.update({"model.layers.x.mlp.down_proj.weight": "int8"}), "is no linear of small"),
    ],
)
def test_names_that_are_none_are_refused(change: Callable[[dict[str, str]], object], says: str) -> None:
    formats = dict.fromkeys(LINEARS, "int8")
    change(formats)
    with pytest.raises(InputError, match=says):
        mixture(SMALL, formats)


def test_what_does_not_fit_the_model_is_refused() -> None:
    tied = replace(SMALL, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"'lm_head.weight' is no linear"):
        mixture(tied, dict.fromkeys([*LINEARS, "lm_head.weight"], "int8"))
    with pytest.raises(InputError, match="in float32 and nothing of it is to be quantized"):
        mixture(SMALL.with_dtype("float32"), dict.fromkeys(LINEARS, "bf16"))
    with pytest.raises(InputError, match=r"down_proj.weight has 24 inputs, which is no multiple of 32. Choose another"):
        stored_parameters(SMALL, mixture(SMALL, dict.fromkeys(LINEARS, "int8") | {DOWN: "int4-g32"}))
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.weight' is no linear"):
        stored_parameters(SMALL, Scheme("int8", overrides=(("model.layers.0.mlp.weight", "fp8"),)))
    with pytest.raises(ValueError, match="bf16 quantizes nothing"):
        Scheme("bf16", overrides=((DOWN, "int8"),))

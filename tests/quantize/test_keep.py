"""llama-quantize --keep: what other tools have quantized, in shards as it is and back; and what can't be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from by_hand import decoded, quantized_names
from compressed import by_the_library, described
from gptq_awq import awq_of, awq_settings, gptq_of, gptq_settings
from invoke import invoke, notes, refuse
from models import stored, write_hf
from parity import count_greedy, decode, logits_after, relative
from quantized import DOWN, HEAD, KEY, Encode, change_settings, reference, write_quantized

from converters.cli import command as convert
from quantize.cli import command as quantize
from quantize.shards.manifest import read_manifest
from quantize.shards.reading import Shards

SIZES = {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 144}


class Kept(NamedTuple):
    """A source that can be kept: what config.json says, how its linears are stored, and in which format they end up."""

    settings: dict[str, Any]
    encode: Encode
    format: str


def gptq(form: str, settings: dict[str, Any] | None = None, **how: Any) -> Kept:
    return Kept(gptq_settings(lm_head=True, **(settings or {})), lambda _, weight: gptq_of(weight, **how), form)


def layout(name: str, dtype: torch.dtype, form: str) -> Kept:
    return Kept(described((name, ["Linear"])) | {"ignore": []}, by_the_library(name, dtype), form)


KEPT = {
    "gptq": gptq("int4-g32-zp-f16"),
    "gptq-sym": gptq("int4-g32-f16", {"sym": True}, sym=True),
    "gptq-v2-bfloat16": gptq("int4-g32-zp", {"checkpoint_format": "gptq_v2"}, version=2, dtype=torch.bfloat16),
    "gptq-channel": gptq("int4", {"sym": True, "group_size": -1}, sym=True, group=-1),
    "gptq-2-bits": gptq("int4-g32-zp-f16", {"bits": 2}, bits=2),
    "gptq-8-bits": gptq("int8-g32-zp-f16", {"bits": 8}, bits=8),
    "awq": Kept(awq_settings(), lambda _, weight: awq_of(weight), "int4-g32-zp-f16"),
    "packed4-g32": layout("packed4-g32", torch.bfloat16, "int4-g32"),
    "packed4-zp": layout("packed4-zp", torch.float16, "int4-zp"),
    "packed8-g32-zp": layout("packed8-g32-zp", torch.float16, "int8-g32-zp-f16"),
    "int8-g32": layout("int8-g32", torch.bfloat16, "int8-g32"),
    "int8-tensor": layout("int8-tensor", torch.bfloat16, "int8"),
    "fp8": layout("fp8", torch.float32, "fp8"),
    "fp8-tensor": layout("fp8-tensor", torch.bfloat16, "fp8"),
}


def keep(root: Path, name: str, *options: object) -> dict[str, torch.Tensor]:
    """Write a source of KEPT and keep it for 3 chips. Returns what its weights stand for."""
    settings, encode, _ = KEPT[name]
    expected = write_quantized(root / "hf", settings, encode, [], **SIZES)
    invoke(quantize, root / "hf", "--keep", "--chips", 3, "--out", root / "three", *options)
    return expected


@pytest.mark.parametrize("name", KEPT)
def test_values_and_scales_are_kept_bit_for_bit(name: str, tmp_path: Path) -> None:
    """On 1 and on 3 chips, and back; in the one format that has them, without an error, and with not a bit changed."""
    expected = keep(tmp_path, name)
    said = notes(invoke(quantize, tmp_path / "hf", "--keep", "--out", tmp_path / "one"))
    assert sum(f"{KEPT[name].format} values and scales are kept as the source has them" in line for line in said) == 1
    shards = Shards(tmp_path / "three")
    assert shards.scheme.default == KEPT[name].format
    assert shards.scheme.quantize_lm_head
    assert not shards.scheme.overrides
    one = stored(tmp_path / "one")
    assert len(quantized_names(one)) == 15
    for weight in quantized_names(one):
        by_hand = torch.from_numpy(decoded(one, weight, expected[weight].shape[1])).float()
        assert torch.equal(by_hand, expected[weight]), weight
        for tensor in shards.parameters[weight].tensors:
            held = Shards(tmp_path / "one").rows(tensor.name, 0, tensor.shape[0])
            assert torch.equal(shards.rows(tensor.name, 0, tensor.shape[0]).float(), held.float())
    report = json.loads((tmp_path / "one" / "quantization_report.json").read_text())
    assert not any(entry["max_error"] for entry in report["tensors"].values())
    invoke(convert, "--source", tmp_path / "three", "--out", tmp_path / "back", "--dtype", "float32")
    back = stored(tmp_path / "back")
    assert all(torch.equal(back[weight], tensor) for weight, tensor in expected.items())


def test_the_integers_are_the_sources(tmp_path: Path) -> None:
    """Less 8, and in our order."""
    keep(tmp_path, "awq")
    held, shards = stored(tmp_path / "hf"), Shards(tmp_path / "three")
    module = DOWN.removesuffix("weight")
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    values = torch.empty(96, 64, dtype=torch.int64)
    for bit, output in enumerate(places):
        values[:, output::8] = held[f"{module}qweight"].long() >> 4 * bit & 15
    assert torch.equal(shards.rows(f"{DOWN}_packed", 0, 64).long(), values.T - 8)
    scale = shards.rows(f"{DOWN}_scale", 0, 64)
    assert scale.dtype == torch.float16
    assert torch.equal(scale, held[f"{module}scales"].T)


def test_shards_of_float16_scales_are_described_and_split_anew(tmp_path: Path) -> None:
    keep(tmp_path, "gptq")
    invoke(quantize, tmp_path / "hf", "--keep", "--out", tmp_path / "one")
    invoke(quantize, tmp_path / "three", "--out", tmp_path / "again")
    for name in ("chip-00-of-01.safetensors", "shards.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    shards = Shards(tmp_path / "again")
    manifest = read_manifest(tmp_path / "again", shards.config)
    assert manifest.as_json()["format"] == "int4-g32-zp-f16"
    assert shards.scheme.title(shards.config) == "int4 in groups of 32, zero points, scales in float16"
    path = tmp_path / "again" / "shards.json"
    path.write_text(path.read_text().replace("int4-g32-zp-f16", "int4-g32-f16"))
    refuse(tmp_path, quantize, tmp_path / "again", "--out", tmp_path / "not", says=["shards.json"])


@pytest.mark.parametrize(
    ("backend", "chips", "dtype"),
    [("eager", 1, "float32"), pytest.param("xla", 3, "float32", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", ["gptq", "awq", "packed4-g32", "fp8"])
def test_greedy_tokens_are_those_of_transformers(
    name: str, backend: str, chips: int, dtype: str, tmp_path: Path
) -> None:
    """With the same weights, dequantized."""
    settings, encode, _ = KEPT[name]
    expected = write_quantized(tmp_path / "hf", settings, encode, [], **SIZES)
    invoke(quantize, tmp_path / "hf", "--keep", "--chips", chips, "--out", tmp_path / "out")
    theirs, prompt = reference(tmp_path / "hf", expected), [1, 5, 9, 3, 77]
    sizes = {"batches": [[prompt]], "new_tokens": 24, "max_seq_len": 64, "buckets": [32]}
    [result] = decode([{"shards": tmp_path / "out", "dtype": dtype, "backend": backend, **sizes}])
    assert relative(result["logits"][0][0], logits_after(theirs, prompt)[-1]) < 1e-5
    assert count_greedy(theirs, prompt, result["token_ids"][0][0]) > 12


# --- what isn't kept


def mixed(_: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Act-order only where there are 96 inputs."""
    order = torch.arange(96).flip(0) if weight.shape[1] == 96 else None
    return gptq_of(weight, order=order)


def test_what_no_format_holds_stays_as_it_is_or_takes_the_format_that_is_given(tmp_path: Path) -> None:
    expected = write_quantized(tmp_path / "hf", gptq_settings(desc_act=True), mixed, [HEAD, KEY])
    said = notes(invoke(quantize, tmp_path / "hf", "--keep", "--chips", 3, "--out", tmp_path / "out"))
    shards = Shards(tmp_path / "out")
    assert torch.equal(shards.dequantized(DOWN, 0, 64), expected[DOWN])
    assert dict(shards.scheme.overrides) == dict.fromkeys([DOWN, DOWN.replace("0", "1", 1), KEY], "unquantized")
    assert [
        line
        for line in said
        if "Dequantized from the source's GPTQ, 4 bits, groups of 32, zero points, act-order" in line
    ]
    assert [
        line for line in said if "act-order spreads its groups over the inputs" in line and "49.15 kB in all" in line
    ]

    said = notes(invoke(quantize, tmp_path / "hf", "--keep", "--int8", "--out", tmp_path / "rest"))
    assert dict(Shards(tmp_path / "rest").scheme.overrides) == dict.fromkeys(
        [DOWN, DOWN.replace("0", "1", 1), KEY], "int8"
    )
    assert [line for line in said if "A second rounding" in line and "act-order" in line and DOWN in line]
    assert [line for line in said if "Quantized here" in line and KEY in line]


@pytest.mark.parametrize("flags", [["--int8"], ["--int4", "--group-size", 32, "--zero-points"]], ids=str)
def test_a_second_rounding_is_said(flags: list[object], tmp_path: Path) -> None:
    """And it is the one of the dequantized weights."""
    expected = write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight))
    said = notes(invoke(quantize, tmp_path / "hf", *flags, "--out", tmp_path / "out"))
    assert [line for line in said if "A second rounding, from the source's GPTQ" in line]
    assert "--keep keeps it as int4-g32-zp-f16" in said[-1]
    write_hf_of(tmp_path, expected)
    invoke(quantize, tmp_path / "plain", *flags, "--out", tmp_path / "again")
    got, again = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert all(torch.equal(got[name].float(), tensor.float()) for name, tensor in again.items())


def write_hf_of(root: Path, weights: dict[str, torch.Tensor]) -> None:
    reference(root / "hf", weights).save_pretrained(root / "plain")


def test_scales_that_no_format_holds(tmp_path: Path) -> None:
    """float32 scales of groups, some of which neither bfloat16 nor float16 holds; those that one does are kept."""
    settings = described(("packed4-g32", ["Linear"]))
    write_quantized(tmp_path / "hf", settings, by_the_library("packed4-g32", torch.float32))
    line = refuse(tmp_path, quantize, tmp_path / "hf", "--keep", "--out", tmp_path / "out")
    assert "neither bfloat16 nor float16 holds its scales" in line

    def widened(dtype: torch.dtype) -> Encode:
        def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            held, exact = by_the_library("packed4-g32", dtype)(name, weight)
            return held | {"weight_scale": held["weight_scale"].float()}, exact

        return encode

    for dtype, form in ((torch.bfloat16, "int4-g32"), (torch.float16, "int4-g32-f16")):
        write_quantized(tmp_path / form, settings, widened(dtype))
        invoke(quantize, tmp_path / form, "--keep", "--out", tmp_path / f"{form}-out")
        assert Shards(tmp_path / f"{form}-out").scheme.default == form


def test_int8_goes_all_the_way_round(tmp_path: Path) -> None:
    """Packed words of 8 bits, kept, and back by --keep-int8."""
    encode = by_the_library("int8", torch.bfloat16)
    write_quantized(tmp_path / "hf", described(("int8", ["Linear"])), encode)
    invoke(quantize, tmp_path / "hf", "--keep", "--chips", 3, "--out", tmp_path / "out")
    invoke(convert, "--source", tmp_path / "out", "--out", tmp_path / "back", "--keep-int8", "--dtype", "float32")
    held, back = stored(tmp_path / "hf"), stored(tmp_path / "back")
    assert back.keys() == held.keys()
    assert all(torch.equal(back[name].float(), tensor.float()) for name, tensor in held.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "holds nothing such"),
        (("--calibrate", "text.txt", "--int8"), "leave out one of both"),
        (("--fit", "1GB", "--calibrate", "text.txt"), "leave out one of both"),
    ],
    ids=str,
)
def test_what_keep_does_not_go_with(options: tuple[object, ...], says: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    refuse(tmp_path, quantize, tmp_path / "hf", "--keep", *options, "--out", tmp_path / "out", says=[says])


def test_shards_are_not_kept(tmp_path: Path) -> None:
    keep(tmp_path, "awq")
    refuse(tmp_path, quantize, tmp_path / "three", "--keep", "--out", tmp_path / "out", says=["holds shards"])


def test_fewer_layers_and_one_chips_file(tmp_path: Path) -> None:
    settings, encode, _ = KEPT["gptq"]
    write_quantized(tmp_path / "hf", settings, encode, [], **SIZES)
    for out in ("all", "some"):
        only = ("--only-chip", 1) if out == "some" else ()
        invoke(quantize, tmp_path / "hf", "--keep", "--layers", 1, "--chips", 3, *only, "--out", tmp_path / out)
    name = "chip-01-of-03.safetensors"
    assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_changed_settings_are_another_source(tmp_path: Path) -> None:
    """What config.json says of the tensors is part of what the shards were made of."""
    write_quantized(tmp_path / "hf", gptq_settings(), lambda _, weight: gptq_of(weight))
    invoke(quantize, tmp_path / "hf", "--keep", "--out", tmp_path / "out")
    change_settings(tmp_path / "hf", checkpoint_format="gptq_v2")
    assert "--force" in invoke(quantize, tmp_path / "hf", "--keep", "--out", tmp_path / "out", exit_code=2).stderr

"""llama-plan: its JSON and text, what fits where, its errors, and that it answers without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from invoke import invoke, invoke_error, refuse
from models import edit_json, write_hf

from converters.model.config import ModelConfig
from converters.model.families.llama import LLAMA
from converters.model.families.presets import PRESETS
from quantize.cli import command as quantize
from quantize.shards.partition import MAX_CHIPS
from quantize.shards.stored import Scheme
from quantize.slices import GENERATIONS, SLICES, find_slice
from runtime.plan.chips import CHIPS, chip_of, libtpu_topology
from runtime.plan.plan import Plan, Workload
from runtime.plan_cli import command as plan

KEYS = {
    "model", "parameters", "parameter_bytes", "cache_bytes", "total_bytes", "min_chips", "target", "chips", "fits",
    "per_chip", "roofline_ms",
}  # fmt: skip
ODD = ModelConfig(
    "odd", 72, 172, 2, 9, 3, 20, vocab_size=515, tie_word_embeddings=True, architecture=LLAMA.architecture
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 9 heads under 3 KV heads, and int8 shards of it for 4 and for 3 chips."""
    root = tmp_path_factory.mktemp("plan")
    write_hf(root / "hf", config=ODD)
    for chips in (4, 3):
        invoke(quantize, root / "hf", "--int8", "--chips", chips, "--out", root / f"shards{chips}")
    return root


def planned(*args: object) -> dict:
    """The JSON that llama-plan prints."""
    result = invoke(plan, *args, "--json", "-")
    assert result.stderr == ""
    return json.loads(result.stdout)


# --- slices


@pytest.mark.parametrize(
    ("name", "chips", "topology"),
    [
        ("v4-8", 4, "v4:2x2x1"),
        ("v4-16", 8, "v4:2x2x2"),  # two TensorCores to a chip
        ("v4-32", 16, "v4:2x2x4"),
        ("v4-64", 32, "v4:2x4x4"),
        ("v5p-16", 8, "v5p:2x2x2"),
        ("v5e-8", 8, "v5e:2x4"),
        ("v5litepod-8", 8, "v5e:2x4"),  # the TPU API's name of v5e-8
        ("v6e-8", 8, "v6e:2x4"),
        ("V6E-256", 256, "v6e:16x16"),
    ],
)
def test_slices(name: str, chips: int, topology: str) -> None:
    assert find_slice(name).devices == find_slice(name).chips == chips
    assert libtpu_topology(find_slice(name))[0] == topology


@pytest.mark.parametrize(
    ("name", "devices", "chips", "topology", "size"),
    [
        ("tpu7x-2", 2, 1, "tpu7x:1x1x1", "2 devices on 1 chip"),
        ("tpu7x-8", 8, 4, "tpu7x:2x2x1", "8 devices on 4 chips"),
        ("TPU7x-16", 16, 8, "tpu7x:2x2x2", "16 devices on 8 chips"),
        ("tpu7x-128", 128, 64, "tpu7x:4x4x4", "128 devices on 64 chips"),
        ("tpu7x-4096", 4096, 2048, "tpu7x:8x16x16", "4096 devices on 2048 chips"),
    ],
)
def test_slices_whose_chips_are_two_devices(name: str, devices: int, chips: int, topology: str, size: str) -> None:
    slice_ = find_slice(name)
    assert (slice_.devices, slice_.chips, slice_.size) == (devices, chips, size)
    assert libtpu_topology(slice_)[0] == topology


def test_the_table_of_slices_is_in_order() -> None:
    assert len({each.name for each in SLICES}) == len(SLICES)
    for generation in GENERATIONS:
        counts = [each.devices for each in SLICES if each.generation == generation]
        assert counts == sorted(set(counts))
        assert counts[-1] <= MAX_CHIPS
        assert generation in CHIPS
    assert chip_of(find_slice("v4-16")).hbm_bytes == 32e9  # as the post counts
    assert chip_of(find_slice("v4-16")).hbm_bandwidth == 1.2e12
    assert 2 * chip_of(find_slice("tpu7x-8")).hbm_bytes == 192e9  # a device has half a chip's
    assert 2 * chip_of(find_slice("tpu7x-8")).hbm_bandwidth == 7.38e12


# --- JSON


def test_json_of_a_target() -> None:
    """175B in int8 on a v4-16: what the post says fits there, with the roofline from bytes added up here."""
    found = planned("--config", "175B", "--int8", "--target", "v4-16")
    assert set(found) == KEYS
    assert (found["model"], found["target"], found["chips"], found["fits"]) == ("175B", "v4-16", 8, True)
    d, f, layers, v = 12288, 32768, 96, 32000
    norms, scales = 2 * layers * 2 * d + 2 * d, 4 * layers * (5 * d + 2 * f)
    whole_scales = 4 * layers * 2 * d  # of o and down, which every chip holds
    matrices = layers * (4 * d * d + 3 * d * f)
    assert found["parameters"] == matrices + layers * 2 * d + d + 2 * v * d
    assert found["parameter_bytes"] == matrices + scales + norms + 4 * v * d
    assert found["cache_bytes"] == layers * 2 * 256 * d * 2
    assert found["total_bytes"] == found["parameter_bytes"] + found["cache_bytes"]
    assert found["min_chips"] == 6
    per_chip = (matrices + (scales - whole_scales) + 4 * v * d) // 8 + whole_scales + norms
    cache = layers * 2 * 256 * d * 2 // 8
    assert found["per_chip"] == {"parameter_bytes": per_chip, "cache_bytes": cache, "hbm_bytes": 32_000_000_000}
    read = per_chip - 2 * (v // 8) * d + 2 * d + cache  # one row of the embedding in place of its part
    assert found["roofline_ms"] == pytest.approx(1000 * read / 1.2e12, rel=1e-12)


def test_json_where_a_chip_is_two_devices() -> None:
    """65B in int8 on the 8 devices of a tpu7x-8's 4 chips, with bytes added up here."""
    found = planned("--config", "65B", "--int8", "--target", "tpu7x-8")
    assert set(found) == KEYS
    assert (found["target"], found["chips"], found["fits"], found["min_chips"]) == ("tpu7x-8", 8, True, 1)
    d, f, layers, v = 8192, 22016, 80, 32000
    matrices = layers * (4 * d * d + 3 * d * f)
    whole = layers * 2 * d  # outputs of o and down, whose scales every device holds
    scales, norms = 4 * (layers * (5 * d + 2 * f) - whole), 2 * (layers * 2 * d + d)
    per_device = (matrices + scales + 4 * v * d) // 8 + 4 * whole + norms
    cache = layers * 2 * 256 * d * 2 // 8
    assert found["per_chip"] == {"parameter_bytes": per_device, "cache_bytes": cache, "hbm_bytes": 96_000_000_000}
    read = per_device - 2 * (v // 8) * d + 2 * d + cache  # one row of the embedding in place of its part
    assert found["roofline_ms"] == pytest.approx(1000 * read / 3.69e12, rel=1e-12)
    assert planned("--config", "175B", "--target", "tpu7x-2")["min_chips"] == 4  # 350.7 GB over 96 GB
    assert planned("--config", "175B", "--target", "tpu7x-2")["fits"] is False


def test_json_of_llama_3_405b() -> None:
    """The published number of parameters; sizes added up here. 8 KV heads on 16 chips are held twice each."""
    found = planned("--config", "llama-3-405b", "--int8", "--target", "v4-32")
    d, f, layers, v, kv = 16384, 53248, 126, 128256, 1024
    matrices, outputs = layers * (2 * d * d + 2 * d * kv + 3 * d * f), layers * (2 * d + 2 * kv + 2 * f + d)
    around = 2 * (2 * v * d + layers * 2 * d + d)
    assert found["parameters"] == 405_853_388_800 == matrices + around // 2
    assert found["parameter_bytes"] == matrices + 4 * outputs + around
    assert found["cache_bytes"] == layers * 2 * 256 * kv * 2
    assert (found["chips"], found["fits"], found["min_chips"]) == (16, True, 13)
    assert found["per_chip"]["cache_bytes"] == found["cache_bytes"] // 8
    assert planned("--config", "llama-3-405b")["parameter_bytes"] == 2 * 405_853_388_800


def test_json_of_opt_175b() -> None:
    """True OPT: biases, 2048 positions and two rows before them, a tied head of 50,272 tokens."""
    found = planned("--config", "opt-175b", "--int8", "--target", "v4-16")
    d, f, layers, v = 12288, 49152, 96, 50272
    matrices, outputs = layers * (4 * d * d + 2 * d * f), layers * (5 * d + f)
    vectors = outputs + layers * 4 * d + 2 * d  # biases and norms
    assert found["parameters"] == 174_604_468_224 == matrices + vectors + (v + 2050) * d
    assert found["parameter_bytes"] == matrices + 4 * outputs + 2 * (vectors + (v + 2050) * d)
    assert found["cache_bytes"] == layers * 2 * 256 * d * 2
    assert (found["chips"], found["fits"], found["min_chips"]) == (8, True, 6)
    whole = layers * 2 * d  # outputs of out_proj and fc2, whose scales and biases every chip holds
    split = matrices + 6 * (outputs - whole) + 2 * v * d
    per_chip = split // 8 + 6 * whole + 2 * (layers * 4 * d + 2 * d + 2050 * d)
    assert found["per_chip"]["parameter_bytes"] == per_chip
    read = per_chip - 2 * 2049 * d + found["cache_bytes"] // 8  # one position; all of the embedding, for the head
    assert found["roofline_ms"] == pytest.approx(1000 * read / 1.2e12, rel=1e-12)
    assert planned("--config", "opt-175b")["parameter_bytes"] == 2 * 174_604_468_224


def test_bfloat16_is_the_default_and_does_not_fit() -> None:
    found = planned("--config", "175b", "--target", "v4-16")
    assert found == planned("--config", "175B", "--bf16", "--target", "v4-16")
    assert (found["fits"], found["min_chips"]) == (False, 11)
    assert planned("--config", "175B", "--target", "v4-32")["fits"] is True


def test_json_without_a_target() -> None:
    found = planned("--config", "65B", "--batch-size", 8, "--max-seq-len", 2048)
    assert set(found) == KEYS
    assert [found[key] for key in ("target", "chips", "fits", "per_chip", "roofline_ms")] == [None] * 5
    assert found["cache_bytes"] == 80 * 2 * 8 * 2048 * 8192 * 2
    assert found["min_chips"] == -(-found["total_bytes"] // 32_000_000_000)


def test_json_of_all_presets(tmp_path: Path) -> None:
    result = invoke(plan, "--json", tmp_path / "plans.json")
    assert "Table 2" in result.stdout
    found = json.loads((tmp_path / "plans.json").read_text())
    assert list(found) == ["bf16", "int8", "int4", "fp8"]
    for scheme, entries in found.items():
        assert entries == [planned("--config", name, f"--{scheme}") for name in PRESETS]
    assert planned("--int8", "--target", "v4-16") == {
        "int8": [planned("--config", name, "--int8", "--target", "v4-16") for name in PRESETS]
    }


def test_min_chips_are_of_the_targets_generation() -> None:
    assert planned("--config", "65B", "--target", "v5e-16")["min_chips"] == 9  # 131.2 GB over 16 GB
    assert planned("--config", "65B", "--target", "v5p-8")["min_chips"] == 2


def test_the_compilers_word_is_added_where_there_is_one() -> None:
    workload = Workload(PRESETS["tiny"], Scheme("int8"), 1, 256)
    bare = Plan(workload, find_slice("v4-8"))
    assert Plan(workload, bare.target, compiled={"temp_bytes": 1}).to_json() == bare.to_json() | {
        "compiled": {"temp_bytes": 1}
    }


def test_a_config_file_is_planned_in_bfloat16(root: Path) -> None:
    """As llama-convert would write it, whatever its own dtype; its name is the file's or its folder's."""
    write_hf(root / "wide", config=replace(ODD, dtype="float32"))
    for name in ("wide", "wide/config.json", "hf"):
        assert planned("--config", root / name) == planned("--config", root / "hf" / "config.json")


# --- shards


@pytest.mark.parametrize("target", [None, "v4-8", "v6e-4"])
def test_shards_say_model_scheme_and_chips(root: Path, target: str | None) -> None:
    found = planned("--shards", root / "shards4", *(("--target", target) if target else ()))
    manifest = json.loads((root / "shards4" / "shards.json").read_text())
    file = next((root / "shards4").glob("chip-00-*"))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert found["chips"] == manifest["chips"] == 4
    assert found["per_chip"]["parameter_bytes"] == file.stat().st_size - header
    assert found["per_chip"]["cache_bytes"] == 2 * 2 * 256 * 20 * 2  # one KV head a chip, of 3 on 4
    assert found["fits"] is (True if target else None)
    assert found["per_chip"]["hbm_bytes"] == (32_000_000_000 if target else None)


def test_shards_in_text(root: Path) -> None:
    text = invoke(plan, "--shards", root / "shards4").stdout
    assert "odd, 2 layers, int8" in text
    assert "9 query and 3 KV heads take 12 and 4 places" in text
    for name in ("v4-8", "v5p-8", "v5e-4", "v6e-4"):
        assert f"  {name}: at least" in text
    assert "tpu7x" not in text  # none has 4 devices
    assert "No slice has so many chips" in invoke(plan, "--shards", root / "shards3").stdout


# --- text


def test_text_of_a_target_shows_the_padding() -> None:
    """33B's 52 heads on 8 chips, as llama-quantize says it: 818.26 MB, 2.5%."""
    lines = invoke(plan, "--config", "33B", "--int8", "--target", "v4-16").stdout.splitlines()
    assert "52 query and 52 KV heads take 56 and 56 places (heads of zeros, repeated KV heads)." in lines
    assert "Padding adds 818.26 MB (2.5%) over all chips." in lines
    assert lines[-2].startswith("Fits, with 27.7")
    assert lines[-1].startswith("A decode step takes 3.52 ms at least")


def test_text_of_a_target_whose_chips_are_two_devices() -> None:
    """Shards are of devices, and the words say so; those of v4's chips stay chips."""
    lines = invoke(plan, "--config", "175B", "--int8", "--target", "tpu7x-8").stdout.splitlines()
    assert "devices at least          2              11  total / HBM: tpu7x of 96.00 GB a device" in lines[6]
    assert lines[8:] == [
        "tpu7x-8: 8 devices on 4 chips, interconnect 2x2x1, each 96.00 GB of HBM at 3.69 TB/s",
        "Each device holds 21.96 GB of parameters and 150.99 MB of cache, 22.11 GB together.",
        "Fits, with 73.89 GB of each device's HBM left for XLA's temporaries, which are not counted.",
        "A decode step takes 5.97 ms at least: 22.01 GB read by each device at 3.69 TB/s.",
    ]
    table = invoke(plan, "--int8", "--target", "tpu7x-2").stdout.splitlines()
    assert table[0].startswith("tpu7x-2: 2 devices on 1 chip, interconnect 1x1x1, each 96.00 GB")
    assert "parameters per device" in table[1]
    assert "more than a device has." in invoke(plan, "--config", "175B", "--target", "tpu7x-2").stdout
    v4 = invoke(plan, "--config", "175B", "--int8", "--target", "v4-16").stdout
    assert "v4-16: 8 chips, interconnect 2x2x2, each 32.00 GB of HBM at 1.20 TB/s\nEach chip holds" in v4


def test_text_of_a_target_that_is_too_small_names_others() -> None:
    text = invoke(plan, "--config", "175B", "--target", "v4-16").stdout
    assert "Does not fit: 11.84 GB more than a chip has." in text
    assert "smallest slices that hold it: v4-32, v5p-8, v5e-32, v6e-16, tpu7x-8." in text
    assert "No slice holds it." in invoke(plan, "--config", "7B", "--target", "v4-8", "--batch-size", 10**7).stdout


def test_text_without_a_target_shows_formula_fact_and_chip_counts() -> None:
    lines = invoke(plan, "--config", "33B", "--int8").stdout.splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["parameters"].split()[1:5] == ["32.53", "B", "31.90", "B"]
    assert rows["total"].split()[1:] == ["33.38", "GB", "64.20", "GB"]
    for chips, heads, padding in (("4", "52/52", "none"), ("8", "56/56", "818.26"), ("16", "64/64", "2.45")):
        assert rows[chips].split()[1:3] == [heads, padding]
    assert rows["1"].count("too small") == 2
    assert rows["8"].split()[-6:] == ["v6e-8", "2.58", "ms", "tpu7x-8", "1.15", "ms"]
    assert rows["2"].split()[-5:] == ["-", "-", "tpu7x-2", "4.47", "ms"]
    assert lines[-2] == "tpu7x: a chip is two devices, each counted as one of the chips here."
    assert "1, 2, 4, 13, 26, 52 chips" in lines[-1]


def test_text_says_where_padding_asks_for_more_chips() -> None:
    rows = [line.split() for line in invoke(plan, "--config", "175B").stdout.splitlines()]
    assert ["chips", "at", "least", "11", "11"] in [row[:5] for row in rows]
    assert ["with", "padding", "12"] in [row[:3] for row in rows]
    assert "with padding" not in invoke(plan, "--config", "65B").stdout


def test_table_of_presets() -> None:
    """The post's figures stand beside exact ones, for what it gives figures of."""
    rows = [line.split() for line in invoke(plan).stdout.splitlines()]
    assert ["65B", "bf16", "65,285,660,672", "130,571", "130,000", "671", "671", "131.24", "130.67", "5", "5"] in [
        row[:11] for row in rows
    ]
    (row,) = (row for row in rows if row[:2] == ["175B", "int8"])
    assert row[-5:] == ["v4-16", "v5p-8", "v5e-16", "v6e-8", "tpu7x-2"]
    other = invoke(plan, "--batch-size", 2).stdout
    assert "130,000" not in other
    huge = (line.split() for line in invoke(plan, "--batch-size", 10**7).stdout.splitlines())
    (row,) = (row for row in huge if row[:2] == ["7B", "int8"])
    assert row[-1] == "none"
    on_target = invoke(plan, "--target", "v4-16").stdout
    fits = {tuple(line.split()[:2]): line.split()[-3] for line in on_target.splitlines()[2:]}
    largest = [("llama-3-405b", kind) for kind in ("bf16", "int8", "fp8")]
    too_large = [("175B", "bf16"), *largest, ("opt-175b", "bf16")]
    assert [key for key, word in fits.items() if word == "no"] == too_large


def test_smallest_slices_are_the_smallest() -> None:
    """Against a search through all slices, from the largest down."""
    for config in (*PRESETS.values(), ODD):
        for scheme in ("int8", "bf16"):
            workload = Workload(config, Scheme(scheme), 4, 1024)
            holding = [each for each in SLICES if workload.on(each.devices).fits(each)]
            expected = [
                min((each for each in holding if each.generation == generation), key=lambda each: each.devices)
                for generation in GENERATIONS
            ]
            assert workload.smallest_slices() == expected


# --- errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--compile",), "--compile is for one model on one slice: give --config or --shards, and --target."),
        (("--config", "7B", "--compile"), "give --config or --shards, and --target."),
        (("--config", "7B", "--buckets", "128"), "give --compile with them."),
        (("--target", "v3-8"), "Unknown slice 'v3-8'; give one of v4-8, v4-16"),
        (("--config", "7B", "--target", "v4-7"), "'v4-7'"),
        (("--config", "7B", "--target", ""), "''"),
        (("--config", "8B"), "'8B'; give one of " + ", ".join(PRESETS)),
        (("--config", "7B", "--shards", "shards4"), "--config or --shards, not both"),
        (("--config", "7B", "--int8", "--bf16"), "--int8 or --bf16, not both"),
        (("--shards", "none"), "none"),
        (("--shards", "hf"), "hf has no shards.json"),
        (("--shards", "shards4", "--bf16"), "--bf16 contradicts shards4, whose shards were made with --int8"),
        (
            ("--shards", "shards4", "--target", "v4-16"),
            "shards4 has shards for 4 chips and v4-16 has 8. Re-shard them: llama-quantize shards4",
        ),
        (
            ("--shards", "shards4", "--target", "tpu7x-8"),
            "for 4 chips and tpu7x-8 has 8 devices on 4 chips. Re-shard them: llama-quantize shards4 --target",
        ),
        (("--config", "7B", "--batch-size", "0"), "--batch-size"),
        (("--config", "7B", "--max-seq-len", "9" * 30), "--max-seq-len"),
        (("--config", "7B", "--batch-size", "10000000"), "need 41944 chips of v4, "),
        (("--config", "7B", "--batch-size", "10000000"), "13982 devices of tpu7x at least"),
        (("--config", "7B", "--batch-size", "10000000", "--json", "-"), "No slice holds 7B"),
        (("--config", "7B", "--json", "no/folder.json"), "--json no/folder.json can't be written"),
        (("--config", "7B", "--json", "hf"), "--json hf can't be written"),
        (("surplus",), "surplus"),
    ],
    ids=str,
)
def test_errors(root: Path, arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    refuse(root, plan, *arguments, says=[says])


def test_a_config_that_is_no_llama(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", lambda fields: fields.update(model_type="gptj"))
    assert "'gptj'" in invoke_error(plan, "--config", tmp_path / "hf")


def test_answers_load_no_torch(root: Path) -> None:
    code = """
import sys
from runtime.plan_cli import command
command.main(sys.argv[1:], standalone_mode=False)
heavy = ("torch", "torch_xla", "numpy", "safetensors", "rich", "gguf")
print(*(name for name in heavy if name in sys.modules), file=sys.stderr)
"""
    for arguments in ((), ("--config", "7B"), ("--shards", "shards4"), ("--config", "33B", "--target", "v4-16")):
        words = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
        assert done.stdout
        assert done.stderr.split() == []


def test_compile_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.plan.tpu_compiler.find_spec", lambda name: None if name == "libtpu" else object())
    line = invoke_error(plan, "--config", "7B", "--target", "v4-8", "--compile")
    assert "libtpu is not installed" in line
    assert "pip install 'llama-tpu-toolchain[tpu]'" in line


@pytest.mark.parametrize(("target", "word"), [("v4-8", "chip"), ("tpu7x-8", "device")])
def test_a_verdict_says_what_its_figures_are_of(target: str, word: str) -> None:
    from runtime.plan.compiled_plan import CompiledGraph, CompiledPlan
    from runtime.plan.compiled_text import compiled_lines

    refused = CompiledGraph(None, None, {}, 0, "Ran out of memory")
    assert compiled_lines(CompiledPlan(find_slice(target), refused, {}, None)) == [
        f"The TPU's compiler, asked for {target} (no TPU was used), per {word}:",
        "  decode step: does not compile: Ran out of memory",
    ]


def test_a_verdict_has_the_same_keys_in_every_case() -> None:
    """Compiled with an estimate, without one, and refused; what is not known is null."""
    from runtime.plan.compiled_plan import CompiledGraph
    from runtime.plan.estimate import Estimate, Kind, Share
    from runtime.plan.tpu_compiler import CompiledProgram

    program = CompiledProgram("", 80, 20, 10, 5, 1.5)
    priced = Estimate({Kind.REST: Share(0.002, 0.001, 3)}, {}, {"copy": 1}, 0.0, {}, 7)
    estimated, unclocked, refused = (
        CompiledGraph(*parts).to_json(95)
        for parts in ((program, priced, {}, 0), (program, None, {}, 0), (None, None, {}, 0, "Ran out of memory"))
    )
    assert estimated.keys() == unclocked.keys() == refused.keys()
    assert (estimated["fits"], estimated["peak_bytes"], estimated["estimated_ms"]) == (True, 95, 2.0)
    assert estimated["by_kind_ms"] == {"rest": {"estimated": 2.0, "roofline": 1.0}}
    unknown = {key for key, value in unclocked.items() if value is None}
    assert unknown == {"out_of_memory", "estimated_ms", "by_kind_ms", "unpriced_instructions", "complete"}
    known = {key: value for key, value in refused.items() if value is not None}
    assert known == {"fits": False, "out_of_memory": "Ran out of memory"}

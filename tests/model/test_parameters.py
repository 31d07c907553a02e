"""The parameter table against transformers' own idea of a LLaMA, at every preset's full size."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from converters.console.errors import DuplicateTensor, MissingTensor, UnexpectedTensor
from converters.model.config import ModelConfig
from converters.model.families.hf_config import from_hf, to_hf
from converters.model.families.llama import LLAMA
from converters.model.families.opt import OPT
from converters.model.families.presets import PRESETS
from converters.model.parameters import check_names, is_known, parameters
from quantize.shards.partition import plan_heads
from quantize.shards.stored import Scheme
from runtime.model.decoder import Decoder
from runtime.model.decoder_tensors import DecoderTensor, collect, decoder_parameters
from runtime.model.kv_cache import KVCache
from runtime.model.sizing import cache_shape

ODD = ModelConfig(
    name="odd",
    architecture=LLAMA.architecture,
    hidden_size=72,
    intermediate_size=172,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=20,
    vocab_size=515,
    tie_word_embeddings=True,
)
# Published sizes of the models that the presets stand for: LLaMA 7B, 13B, 33B, 65B in billions (Touvron et al. 2023,
# table 2), and the exact counts that go with the later models' published files.
PUBLISHED = {"7B": 6.7, "13B": 13.0, "33B": 32.5, "65B": 65.2}
COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "code-llama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
}
WIDE = [
    PRESETS[name] for name in (*PUBLISHED, "tiny", "175B", "llama-2-70b", "opt-350m", "opt-175b")
]  # each is a model of half a second


@pytest.mark.parametrize("config", [*PRESETS.values(), ODD], ids=lambda config: config.name)
def test_shapes_are_those_of_transformers(config: ModelConfig) -> None:
    with torch.device("meta"):
        fields = to_hf(config)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    assert {parameter.name: parameter.shape for parameter in parameters(config)} == theirs


LLAMAS = [config for config in PRESETS.values() if not config.name.startswith("opt-")]
OPTS = [config for config in PRESETS.values() if config.name.startswith("opt-")]


@pytest.mark.parametrize("config", LLAMAS, ids=lambda config: config.name)
def test_count_is_the_closed_formula(config: ModelConfig) -> None:
    d, f, v, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    kv = d * config.num_kv_heads // config.num_heads
    closed = layers * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d) + 2 * v * d + d
    assert sum(parameter.elements for parameter in parameters(config)) == closed
    if config.name in PUBLISHED:
        assert closed / 1e9 == pytest.approx(PUBLISHED[config.name], abs=0.1)
    assert closed == COUNTS.get(config.name, closed)


@pytest.mark.parametrize("config", OPTS, ids=lambda config: config.name)
def test_count_of_opt_is_the_closed_formula(config: ModelConfig) -> None:
    """And the paper's number: the name. Of 2048 positions and two rows before them; a tied head."""
    d, f, v, layers, w = config.hidden_size, config.intermediate_size, 50272, config.num_layers, config.word_size
    linears = 4 * (d * d + d) + (d * f + f) + (f * d + d)
    around = v * w + 2050 * d + (2 * d * w if w != d else 2 * d)  # 350M: projections, and no norm behind the blocks
    closed = layers * (linears + 2 * 2 * d) + around
    assert sum(parameter.elements for parameter in parameters(config)) == closed
    assert closed == COUNTS.get(config.name, closed)
    billions = float(config.name[4:-1]) / (1000 if config.name.endswith("m") else 1)
    assert closed / 1e9 == pytest.approx(billions, rel=0.06)


def test_every_published_model_is_there() -> None:
    assert COUNTS.keys() | PUBLISHED.keys() | {"tiny", "175B", "opt-66b", "opt-175b"} == PRESETS.keys()


@pytest.mark.parametrize(("name", "ffn"), [("7B", 11008), ("33B", 17920), ("65B", 22016), ("175B", 32768)])
def test_feed_forward_sizes(name: str, ffn: int) -> None:
    assert PRESETS[name].intermediate_size == ffn


@pytest.mark.parametrize("chips", [1, 8, 16])
@pytest.mark.parametrize("config", [*WIDE, ODD], ids=lambda config: config.name)
@pytest.mark.parametrize("fuse_bytes", [None, 0])
def test_decoder_runs_on_the_shapes_of_the_shards(config: ModelConfig, chips: int, fuse_bytes: int | None) -> None:
    """At full width and depth, on the meta device: what the shards hold is what the decoder takes."""
    scheme = Scheme("int8")

    def load(tensor: DecoderTensor) -> torch.Tensor:
        shape = list(tensor.local_shape(config, chips))
        if tensor.shard is not None:
            shape[tensor.shard] *= chips
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    wanted = collect(decoder_parameters(config, scheme, chips, fuse_bytes), load)
    heads = plan_heads(config.num_heads, config.num_kv_heads, chips)
    decoder = Decoder(config, heads, torch.bfloat16, wanted, lambda tensor: tensor.to("meta"))
    shape = cache_shape(config, chips, 2, 64)
    with torch.device("meta"):
        cache = KVCache([[torch.zeros(shape, dtype=torch.bfloat16) for _ in "kv"] for _ in range(config.num_layers)])
        tokens, slots, offsets = torch.zeros(2, 5, dtype=torch.long), torch.arange(5), torch.zeros(2, dtype=torch.long)
        logits = decoder(tokens, slots, offsets, cache)
    assert (logits.shape, logits.dtype) == ((2, config.vocab_size), torch.bfloat16)


def test_decoder_names_a_tensor_too_many_or_too_few() -> None:
    wanted = decoder_parameters(ODD, Scheme("int8"), 1, fuse_bytes=0)
    tensors = dict(collect(wanted, lambda tensor: torch.empty(tensor.local_shape(ODD, 1), dtype=tensor.dtype)))
    heads = plan_heads(ODD.num_heads, ODD.num_kv_heads, 1)
    with pytest.raises(UnexpectedTensor, match="extra"):
        Decoder(ODD, heads, torch.float32, tensors | {"extra": torch.empty(1)})
    del tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(MissingTensor, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        Decoder(ODD, heads, torch.float32, tensors)


def test_names_are_checked() -> None:
    names = [parameter.name for parameter in parameters(ODD)]
    check_names(ODD, names, "here")
    with pytest.raises(MissingTensor, match=r"model\.norm\.weight"):
        check_names(ODD, [name for name in names if name != "model.norm.weight"], "here")
    with pytest.raises(DuplicateTensor, match=r"model\.norm\.weight"):
        check_names(ODD, [*names, "model.norm.weight"], "here")
    with pytest.raises(UnexpectedTensor, match=r"model\.layers\.2\.mlp"):
        check_names(ODD, [*names, "model.layers.2.mlp.up_proj.weight"], "here")
    assert is_known("model.layers.99.self_attn.q_proj.weight", LLAMA.architecture)
    assert not is_known("model.layers.0.self_attn.q_proj.bias", LLAMA.architecture)
    assert not is_known("xmodel.norm.weight", LLAMA.architecture)
    assert is_known("model.decoder.layers.99.self_attn.q_proj.bias", OPT.architecture)
    assert is_known("model.decoder.project_in.weight", OPT.architecture)
    assert not is_known("model.layers.0.self_attn.q_proj.weight", OPT.architecture)


@pytest.mark.parametrize("config", [*PRESETS.values(), ODD], ids=lambda config: config.name)
def test_config_survives_its_json(config: ModelConfig) -> None:
    assert from_hf(to_hf(config)) == config


def test_rope_theta_is_read_from_both_generations_of_config() -> None:
    fields = to_hf(ODD)
    del fields["rope_theta"]
    assert from_hf(fields).rope_theta == 10000.0
    assert from_hf(fields | {"rope_theta": 5e5}).rope_theta == 5e5
    assert from_hf(fields | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}).rope_theta == 1e6

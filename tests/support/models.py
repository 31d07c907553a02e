"""Small random models for tests, as transformers saves them, and the state of a directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from converters.model.config import ModelConfig
from converters.model.families.hf_config import to_hf
from converters.model.families.llama import LLAMA
from converters.model.parameters import parameters


def make_model(
    directory: Path,
    *,
    heads: int = 4,
    kv_heads: int | None = None,
    hidden: int = 48,
    head_dim: int | None = None,
    layers: int = 2,
    ffn: int = 44,
    vocab: int = 211,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    form: str = "safetensors",
    max_shard_size: str | None = None,
    theta: float = 10000.0,
    eps: float = 1e-5,
    eos: int | list[int] | None = None,
) -> LlamaForCausalLM:
    """Save a random LLaMA model into ``directory`` and return it, ready to be run.

    ``form`` is ``safetensors`` or ``bin``; with ``max_shard_size`` it is an indexed set of files. Weights are spread
    so that the largest logit stands out, attention matters and greedy decoding takes long to repeat itself; no norm is
    all ones. Without ``eos`` generation never ends.
    """
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        rope_theta=theta,
        rms_norm_eps=eps,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=eos,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            _randomize(name, parameter.data)
    _save(model, directory, dtype, form, max_shard_size)
    return model


def make_opt(
    directory: Path,
    *,
    heads: int = 4,
    hidden: int = 48,
    layers: int = 2,
    ffn: int = 44,
    vocab: int = 211,
    width: int | None = None,
    positions: int = 128,
    tied: bool = True,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    form: str = "safetensors",
    max_shard_size: str | None = None,
    **fields: Any,
) -> OPTForCausalLM:
    """Save a random OPT model as ``make_model`` does; no bias is zero. ``width`` is the embedding's.

    ``fields`` are further ones of OPTConfig. Generation never ends.
    """
    config = OPTConfig(
        hidden_size=hidden,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocab,
        word_embed_proj_dim=width or hidden,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        eos_token_id=None,
        **fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
        last = "model.decoder." + ("" if config.do_layer_norm_before else f"layers.{layers - 1}.")
        for name, parameter in model.named_parameters():
            if name == f"{last}final_layer_norm.weight":
                parameter.data.uniform_(-1.5, 1.5)  # as above
            elif name.endswith(".bias"):
                parameter.data.normal_(std=0.3)
            elif "embed_positions" in name:
                parameter.data.normal_()
            else:
                _randomize(name, parameter.data)
    _save(model, directory, dtype, form, max_shard_size)
    return model


def _save(
    model: PreTrainedModel, directory: Path, dtype: torch.dtype | str, form: str, max_shard_size: str | None
) -> None:
    for parameter in model.parameters():  # model.to would round the frequencies of RoPE as well
        parameter.data = parameter.data.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    model.eval()
    model.config.dtype = model.dtype
    directory.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        model.save_pretrained(directory, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    else:
        model.config.save_pretrained(directory)
        _save_bin(model.state_dict(), directory, indexed=max_shard_size is not None)


def _randomize(name: str, weight: torch.Tensor) -> None:
    if name == "model.norm.weight":
        weight.uniform_(-1.5, 1.5)  # of both signs, or tied embeddings would repeat the last token for ever
    elif weight.dim() == 1:
        weight.uniform_(0.5, 1.5)
    elif "embed_tokens" in name or "lm_head" in name:
        weight.normal_()
    else:
        weight.normal_(std=weight.shape[1] ** -0.5)


def _save_bin(state: dict[str, torch.Tensor], directory: Path, indexed: bool) -> None:
    """torch's .bin, which transformers 5 reads but no longer writes; an indexed set has two files."""
    if not indexed:
        torch.save(state, directory / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file_name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


SMALL = ModelConfig(
    "small",
    architecture=LLAMA.architecture,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=50,
    max_position_embeddings=128,
)


def random_tensors(config: ModelConfig = SMALL) -> dict[str, torch.Tensor]:
    """Weights for a configuration, by name."""
    generator = torch.Generator().manual_seed(0)
    return {
        parameter.name: torch.randn(parameter.shape, generator=generator).to(getattr(torch, config.dtype))
        for parameter in parameters(config)
    }


def write_hf(
    directory: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    config: ModelConfig = SMALL,
    files: int = 1,
    **fields: object,
) -> Path:
    """A Hugging Face directory without transformers: for tests of damaged ones, which need many, quickly.

    ``fields`` go into config.json; with more than one of ``files`` there is an index.
    """
    tensors = random_tensors(config) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_hf(config) | fields))
    if files == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for number in range(files):
        part = list(tensors)[number::files]
        file_name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Let ``change`` alter the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def renew(directory: Path, name: str) -> None:
    """Make a shards directory's manifest agree with a file that was changed: size and digest."""
    data = (directory / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(directory / "shards.json", lambda content: content["files"].update({name: entry}))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's safetensors files, read by the library."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def snapshot(directory: Path) -> dict[str, str]:
    """Every path below a directory, with the digest of its content: equal exactly where nothing has changed."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(directory.rglob("*"))
    }


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name

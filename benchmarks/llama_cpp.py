"""llama.cpp as a peer of the decoder: a GGUF file of the shards' weights, run through its prebuilt libraries.

`npm pack @node-llama-cpp/linux-x64` fetches a build, in package/bins/linux-x64. It comes without headers, so the fields
to set in its structures are found by their default values, and anything unexpected ends the run.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_LIBRARIES = ("libggml-base", "libggml.", "libllama.")  # each needs the ones before it
_DEFAULT_CONTEXT, _DEFAULT_THREADS = (512, 2048, 512, 1), 4  # n_ctx, n_batch, n_ubatch, n_seq_max; both thread counts
_QUIET = 5  # above every level of its log
# Where its log goes: nowhere. The library keeps it as long as it is loaded.
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *message: None)


def write_gguf(shards_directory: Path, path: Path, kind: str = "Q8_0") -> int:
    """Write shards' dequantized weights to a GGUF file. Returns the bytes that a step reads.

    Matrices are in ``kind``: all of them in Q8_0; in Q4_0 the embeddings and the head are in F16, as shards leave them.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    from converters.model.families.llama import GGUF
    from converters.model.parameters import parameters
    from converters.sources.interleaved_rows import INTERLEAVED, interleaved_rows
    from quantize.shards.reading import Shards

    shards = Shards(shards_directory)
    config = shards.config
    names = {hf: gguf for gguf, hf in GGUF.model_names.items()} | {
        f"model.layers.{n}.{hf}.weight": f"blk.{n}.{gguf}.weight"
        for n in range(config.num_layers)
        for gguf, hf in GGUF.block_names.items()
    }
    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_block_count, config.num_layers),
        (writer.add_head_count, config.num_heads),
        (writer.add_head_count_kv, config.num_kv_heads),
        (writer.add_layer_norm_rms_eps, config.norm_eps),
        (writer.add_rope_freq_base, config.rope_theta),
        (writer.add_rope_dimension_count, config.head_dim),
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_tokenizer_model, "no_vocab"),
    ):
        add(value)
    step_bytes = 0
    for parameter in parameters(config):
        values = shards.dequantized(parameter.name, 0, parameter.shape[0]).float().numpy()
        if parameter.name.endswith(INTERLEAVED):
            kept = np.empty_like(values)
            kept[interleaved_rows(0, len(values), config.head_dim)] = values
            values = kept
        matrix = kind if kind == "Q8_0" or parameter.row.quantized else "F16"
        dtype = GGMLQuantizationType["F32" if values.ndim == 1 else matrix]
        stored = quantize(values, dtype)
        writer.add_tensor(names[parameter.name], stored, raw_dtype=dtype)
        if config.tie_word_embeddings or not parameter.name.endswith("embed_tokens.weight"):
            step_bytes += stored.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return step_bytes


class _Parameters(ctypes.Structure):
    """Parameters of a model or a context in any version; the fields to be set are at the front."""

    _fields_ = [("values", ctypes.c_int32 * 16), ("rest", ctypes.c_uint8 * 448)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class LlamaCpp:
    """A model in llama.cpp with a context for ``rows`` sequences of ``max_seq_len`` tokens each."""

    def __init__(self, libraries: Path, gguf: Path, vocab_size: int, rows: int, max_seq_len: int, threads: int) -> None:
        for name in _LIBRARIES:
            library = ctypes.CDLL(str(next(libraries.glob(f"{name}*so*"))), mode=ctypes.RTLD_GLOBAL)
            if name == _LIBRARIES[1]:
                library.ggml_backend_load_all_from_path(str(libraries).encode())
        self._library, self._vocab_size = library, vocab_size
        library.llama_log_set(_LOG, None)
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(library, name).restype = _Parameters
        for name in ("llama_model_load_from_file", "llama_init_from_model"):
            getattr(library, name).restype = ctypes.c_void_p
        library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Parameters]
        library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
        library.llama_batch_init.restype = _Batch
        library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
        library.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        library.llama_get_memory.argtypes = [ctypes.c_void_p]
        library.llama_get_memory.restype = ctypes.c_void_p
        library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        library.llama_model_get_vocab.restype = ctypes.c_void_p
        library.llama_tokenize.argtypes = [
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32),
            *(ctypes.c_bool, ctypes.c_bool),
        ]
        model = library.llama_model_load_from_file(str(gguf).encode(), library.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp could not load {gguf}")
        self._model = model
        self._context = library.llama_init_from_model(model, self._parameters(rows, max_seq_len, threads))
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._batch = library.llama_batch_init(rows * max_seq_len, 0, 1)

    def _parameters(self, rows: int, max_seq_len: int, threads: int) -> _Parameters:
        parameters = self._library.llama_context_default_params()
        values = list(parameters.values)
        place = next((p for p in range(4, 12) if values[p : p + 2] == [_DEFAULT_THREADS] * 2), None)
        if tuple(values[:4]) != _DEFAULT_CONTEXT or place is None:
            raise RuntimeError(f"this version of llama.cpp has other context parameters: {values}")
        total = rows * max_seq_len
        parameters.values[:4] = total, max(2048, total), 512, rows
        parameters.values[place : place + 2] = threads, threads
        return parameters

    def decode(self, tokens: list[list[int]], position: int, logits: bool) -> list[int]:
        """Process ``tokens``, the same number in each row, from ``position`` on; with ``logits``, returns every row's
        most probable next token.
        """
        last = self._run(tokens, position, lambda offset, count: logits and offset == count - 1)
        if not logits:
            self._library.llama_synchronize(ctypes.c_void_p(self._context))
            return []
        return [int(self._logits(place).argmax()) for place in last]

    def log_probabilities(self, ids: list[int]) -> list[float]:
        """Those of the tokens of a window, in nats, each after the ones before it; all but the first's."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._run([ids[:-1]], 0, lambda offset, count: True)
        found = []
        for place, token in enumerate(ids[1:]):
            logits = self._logits(place).astype(np.float64)
            highest = logits.max()
            found.append(float(logits[token] - highest - np.log(np.exp(logits - highest).sum())))
        return found

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """A text's ids by llama.cpp's own tokenizer, special tokens in it found."""
        content = text.encode()
        room = len(content) + 8
        ids = (ctypes.c_int32 * room)()
        vocab = self._library.llama_model_get_vocab(self._model)
        count = self._library.llama_tokenize(vocab, content, len(content), ids, room, add_special, True)
        if count < 0:
            raise RuntimeError("llama.cpp could not cut the text")
        return list(ids[:count])

    def _run(self, tokens: list[list[int]], position: int, asks: Callable[[int, int], bool]) -> list[int]:
        """Process tokens; ``asks`` says, by a token's place in its row and the row's length, whether logits are wanted.

        Returns the place of each row's last token in the batch.
        """
        batch, last = self._batch, []
        batch.n_tokens = 0
        for row, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                place = batch.n_tokens
                batch.token[place], batch.pos[place] = token, position + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = asks(offset, len(ids))
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode")
        return last

    def _logits(self, place: int) -> np.ndarray:
        """The logits [V] after the token at a place of the last batch."""
        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, place), (self._vocab_size,))


def generate(model: LlamaCpp, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy decoding as llama-run counts it."""
    model.decode([prompt[:1] for prompt in prompts], 0, logits=True)  # sets up memory; the slot is overwritten below
    begin = time.perf_counter()
    model.decode([prompt[1:-1] for prompt in prompts], 1, logits=False)
    filled = time.perf_counter()
    tokens, produced = [prompt[-1] for prompt in prompts], []
    for step in range(new_tokens):
        tokens = model.decode([[token] for token in tokens], len(prompts[0]) - 1 + step, logits=True)
        produced.append(tokens)
    done = time.perf_counter()
    return {
        "prefill_ms": 1000 * (filled - begin),
        "per_token_latency_ms": 1000 * (done - filled) / new_tokens,
        "token_ids": [list(row) for row in zip(*produced, strict=True)],
    }

"""Conversion and quantization compared with the disk's own speed and with other quantizers.

    python benchmarks/convert_quantize.py [--layers 32] [--folder /tmp] [--repeat 3] [--methods floor,ours]
                                            [--llama-cpp FOLDER] [--json FILE]

Makes a 7B-shaped checkpoint of random weights and quantizes it with each method, in turns. Each run is a separate
process with two threads, and the source's pages are dropped from the cache before it. Reports the median time,
giga-weights per second and the peak resident memory (as the operating system reports it, mapped files included).

torchao is measured if it is installed (for torch 2.9: pip install torchao==0.14.1), llama.cpp's quantizer if
--llama-cpp names the folder of its libraries (npm pack @node-llama-cpp/linux-x64 fetches a build, in package/bins).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
_UINT8 = np.dtype(np.uint8)
CHUNK = 8 << 20
LLAMA_CPP = "LLAMA_CPP_LIBRARIES"  # passes the folder to the process that measures
MOSTLY_Q8_0 = 7  # llama.cpp's number for the file type
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCRIPTS = Path(sys.executable).parent
OURS = {  # by the names in the table, the options of llama-quantize
    "ours": ("--int8",),
    "ours int4": ("--int4",),
    "ours int4 with zero points": ("--int4", "--zero-points"),
    "ours fp8": ("--fp8",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--methods", help="only these, by the names in the table, with commas between")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        METHODS[options.method](options.work)
        return
    if options.llama_cpp:
        os.environ[LLAMA_CPP] = str(options.llama_cpp.resolve())
    names = [name for name in (*OURS, *METHODS) if name != "write-gguf"]
    if options.methods:
        names = options.methods.split(",")
        if not {"floor", "ours"} <= set(names) <= {*METHODS, *OURS}:
            sys.exit(f"--methods takes floor, ours and any of {', '.join([*METHODS, *OURS])}")
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        results = measure(Path(work), options.layers, options.repeat, names)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def measure(work: Path, layers: int, repeat: int, names: list[str]) -> dict[str, Any]:
    """Run every named method that is available ``repeat`` times, in turns."""
    checkpoint = work / "checkpoint"
    making = _run(
        [SCRIPTS / "llama-convert", "--config", "7B", "--layers", layers, "--storage", "files", "--out", checkpoint],
        work,
    )
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text("utf-8"))
    weights = index["metadata"]["total_parameters"]
    if not importlib.util.find_spec("torchao"):
        names = [name for name in names if name != "torchao"]
    if LLAMA_CPP not in os.environ:
        names = [name for name in names if name != "llama.cpp Q8_0"]
    if "llama.cpp Q8_0" in names:
        _run(
            [sys.executable, __file__, "--method", "write-gguf", "--work", work], work
        )  # in a process, to keep this one small
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            _drop_from_cache([*checkpoint.iterdir(), *work.glob("*.gguf")])
            command = [sys.executable, __file__, "--method", name, "--work", work]
            if name in OURS:
                command = [SCRIPTS / "llama-quantize", checkpoint, *OURS[name], "--chips", 8, "--out", work / "out"]
            runs[name].append(_run(command, work))
            shutil.rmtree(work / "out", ignore_errors=True)
            for path in work.glob("out.*"):
                path.unlink()
    rows = {}
    for name, taken in runs.items():
        seconds = [run["seconds"] for run in taken]
        rows[name] = {
            "seconds": statistics.median(seconds),
            "spread_s": [min(seconds), max(seconds)],
            "giga_weights_per_s": weights / 1e9 / statistics.median(seconds),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in taken),
        }
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "layers": layers,
        "weights": weights,
        "convert_from_seed": making | {"bytes_per_s": 2 * weights / making["seconds"]},
        "before_the_disk": before_the_disk(),
        "quantize": rows,
    }


def table(results: dict[str, Any]) -> str:
    floor_s, ours_s = (results["quantize"][name]["seconds"] for name in ("floor", "ours"))
    making, memory = results["convert_from_seed"], results["before_the_disk"]
    lines = [
        f"7B shape, {results['layers']} layers, {results['weights'] / 1e9:.2f} G weights; {results['machine']}",
        "",
        f"In memory: random weights made at {memory['random_bytes_per_s'] / 1e9:.2f} GB/s, quantized at "
        f"{memory['quantize_weights_per_s'] / 1e9:.2f} Gw/s.",
        f"llama-convert --storage files: {making['seconds']:.1f} s, {making['bytes_per_s'] / 1e9:.2f} GB/s, peak RSS "
        f"{making['peak_rss_bytes'] / 1e9:.2f} GB.",
        "",
        "| quantization, disk to disk (int8) | s (median) | spread | Gw/s | to the floor | to ours | peak RSS, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["quantize"].items():
        low, high = row["spread_s"]
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {low:.1f} - {high:.1f} | {row['giga_weights_per_s']:.2f} | "
            f"{row['seconds'] / floor_s:.2f} | {row['seconds'] / ours_s:.2f} | {row['peak_rss_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def before_the_disk() -> dict[str, float]:
    """Rates of the two inner loops on all cores, with the values discarded."""
    from converters.files.row_blocks import row_blocks
    from converters.model.families.presets import PRESETS
    from converters.sources.random_init import RandomSource
    from quantize.formats.int8 import quantize_rows

    source, name = RandomSource(PRESETS["7B"], 0), "model.layers.0.mlp.up_proj.weight"
    ranges = list(row_blocks(0, 11008, 4096))
    weight = source.rows(name, 0, 11008)
    making = _rate([lambda a=a, b=b: source.rows(name, a, b) for a, b in ranges])
    quantizing = _rate([lambda a=a, b=b: quantize_rows(weight[a:b]) for a, b in ranges])
    return {"random_bytes_per_s": weight.nbytes * making, "quantize_weights_per_s": weight.numel() * quantizing}


def _rate(tasks: list[Callable[[], Any]]) -> float:
    """How many times per second a list of tasks is done: the median of nine runs."""
    from converters.files.parallel import in_order

    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        for _ in in_order(tasks):
            pass
        seconds.append(time.perf_counter() - begin)
    return 1 / statistics.median(seconds)


def floor(work: Path) -> None:
    """Read the source's bytes, then write half as many, with plain sequential I/O and one fsync."""
    count = 0
    for path in sorted((work / "checkpoint").glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                count += len(chunk)
    block, left = os.urandom(CHUNK), count // 2
    with (work / "out.safetensors").open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(block[: min(left, CHUNK)])
        os.fsync(file.fileno())


def plain(work: Path) -> None:
    """The straightforward torch expression, tensor by tensor."""
    import torch

    def quantize(weight: Any) -> dict[str, Any]:
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        return {"": torch.clamp(torch.round(weight.float() / scale), -127, 127).to(torch.int8), "_scale": scale}

    _whole_model(work, quantize)


def gpt_fast(work: Path) -> None:
    """The arithmetic of gpt-fast's per-channel int8 quantizer: row minima and maxima, a scale for [-128, 127]."""
    import torch

    def quantize(weight: Any) -> dict[str, Any]:
        low, high = torch.aminmax(weight.float(), dim=1)
        largest = torch.maximum(-torch.clamp(low, max=0), torch.clamp(high, min=0))
        scale = torch.clamp(largest / 127.5, min=torch.finfo(torch.float32).eps)
        zero = torch.zeros_like(scale, dtype=torch.int64)
        values = torch.round(weight / scale.unsqueeze(1)) + zero.unsqueeze(1)
        return {"": torch.clamp(values, -128, 127).to(torch.int8), "_scale": scale}

    _whole_model(work, quantize)


def torchao(work: Path) -> None:
    """torchao's int8 weight-only quantization, with a linear module for each weight."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantize(weight: Any) -> dict[str, Any]:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(linear, Int8WeightOnlyConfig())
        inner = linear.weight.tensor_impl
        return {"": inner.int_data, "_scale": inner.scale.reshape(-1, 1)}

    _whole_model(work, quantize)


def llama_cpp(work: Path) -> None:
    """llama.cpp's quantizer from bfloat16 to Q8_0: blocks of 32 weights with a scale each, the head included."""
    import ctypes

    folder = Path(os.environ[LLAMA_CPP])
    for name in ("libggml-base", "libggml.", "libllama."):
        library = ctypes.CDLL(str(next(folder.glob(f"{name}*so*"))), mode=ctypes.RTLD_GLOBAL)

    class Parameters(ctypes.Structure):
        # The first two fields of llama_model_quantize_params, and enough space for the rest in any version.
        _fields_ = [("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("rest", ctypes.c_uint8 * 504)]

    library.llama_model_quantize_default_params.restype = Parameters
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.type = THREADS, MOSTLY_Q8_0
    paths = (str(work / "model.gguf").encode(), str(work / "out.gguf").encode())
    if library.llama_model_quantize(*paths, ctypes.byref(parameters)):
        sys.exit("llama.cpp could not quantize")
    with (work / "out.gguf").open("rb") as file:
        os.fsync(file.fileno())


def write_gguf(work: Path) -> None:
    """Write the checkpoint as a bfloat16 GGUF file. Rows keep their order, since it is only quantized and never run."""
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    from converters.model.families.llama import GGUF
    from converters.model.parameters import parameters
    from converters.sources.opening import open_source

    source = open_source(work / "checkpoint")
    config = source.config
    layers = config.num_layers
    writer = GGUFWriter(work / "model.gguf", "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    names = {hf: gguf for gguf, hf in GGUF.model_names.items()} | {
        f"model.layers.{n}.{hf}.weight": f"blk.{n}.{gguf}.weight"
        for n in range(layers)
        for gguf, hf in GGUF.block_names.items()
    }
    kinds = {1: (torch.float32, GGMLQuantizationType.F32), 2: (torch.bfloat16, GGMLQuantizationType.BF16)}
    for parameter in parameters(config):
        dtype, kind = kinds[len(parameter.shape)]
        row = (*parameter.shape[:-1], parameter.shape[-1] * dtype.itemsize)
        nbytes = parameter.elements * dtype.itemsize
        writer.add_tensor_info(names[parameter.name], row, _UINT8, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for parameter in parameters(config):
        dtype, _ = kinds[len(parameter.shape)]
        values = source.rows(parameter.name, 0, parameter.shape[0]).to(dtype)
        writer.write_tensor_data(values.view(torch.uint8).numpy())
    writer.close()


def _whole_model(work: Path, quantize: Callable[[Any], dict[str, Any]]) -> None:
    """Quantize every linear of the checkpoint and save one file at the end, as such tools do."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(THREADS)
    result = {}
    for path in sorted((work / "checkpoint").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                parts = quantize(tensor) if name.split(".")[-2] in LINEARS else {"": tensor}
                result |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(result, work / "out.safetensors")
    with (work / "out.safetensors").open("rb") as file:
        os.fsync(file.fileno())


def _run(command: list[object], work: Path) -> dict[str, float]:
    """Run a process and return its time and its peak resident memory, as the operating system reports it."""
    begin = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, cwd=work)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} ended with status {process.returncode}")
    return {"seconds": time.perf_counter() - begin, "peak_rss_bytes": usage.ru_maxrss * 1024}


def _drop_from_cache(paths: list[Path]) -> None:
    """Make the next reader of these files read from the disk."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


METHODS: dict[str, Callable[[Path], None]] = {
    "floor": floor,
    "plain torch expression": plain,
    "gpt-fast's arithmetic": gpt_fast,
    "torchao": torchao,
    "llama.cpp Q8_0": llama_cpp,
    "write-gguf": write_gguf,  # makes the file that llama.cpp reads
}

if __name__ == "__main__":
    main()

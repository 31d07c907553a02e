"""What llama-convert --format gguf writes, run by llama.cpp: its perplexity beside llama-eval's of the same weights.

    python benchmarks/gguf_peer.py SHARDS... --text TEXT --libraries package/bins/linux-x64
                                   [--gguf-type Q8_0|Q4_0|F16] [--tokens 2048] [--window 512] [--folder /tmp]

Each directory of shards is exported, its file loaded by llama.cpp's prebuilt libraries (see llama_cpp.py), and the
first --tokens of the text are predicted in windows by both. Both take the same token ids, those of the shards'
tokenizer; with a .txt, llama.cpp's own tokenizer must give the same ids for it. Ends with status 1 where a perplexity
differs by more than 1%, or ids differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llama_cpp import LlamaCpp

from converters.sources.opening import open_source
from converters.tokenizers.reader import read_tokenizer

SCRIPTS = Path(sys.executable).parent
CLOSE = 0.01


def main() -> int:
    options = _options()
    print(f"{'shards':24} {'types':18} {'size':>10} {'llama.cpp':>10} {'llama-eval':>10} {'ratio':>8}  ids")
    status = 0
    for shards in options.shards:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            row = _measure(shards, Path(folder), options)
        ratio = row["theirs"] / row["ours"]
        print(
            f"{shards.name:24} {row['types']:18} {row['bytes'] / 1e6:7.2f} MB {row['theirs']:10.4f} "
            f"{row['ours']:10.4f} {ratio:8.4f}  {row['ids']}"
        )
        if abs(ratio - 1) > CLOSE or row["ids"].startswith("other"):
            status = 1
    return status


def _measure(shards: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    wanted = ("--gguf-type", options.gguf_type) if options.gguf_type else ()
    said = _run("llama-convert", "--source", shards, "--format", "gguf", *wanted, "--out", folder / "out")
    path = folder / "out" / "model.gguf"
    source = open_source(shards)
    model = LlamaCpp(options.libraries, path, source.config.vocab_size, 1, options.window, os.cpu_count() or 1)
    tokenizer, _ = read_tokenizer(source.auxiliary_files(), str(shards), source.config.vocab_size)
    if options.text.suffix == ".json":
        ids, compared = json.loads(options.text.read_text("utf-8")), "given"
    else:
        text = options.text.read_text("utf-8")
        ids = tokenizer.encode(text).ids
        compared = f"the same {len(ids)}" if model.tokenize(text, True) == ids else "other ones"
    ids = ids[: options.tokens]
    found = [
        each
        for start in range(0, len(ids), options.window)
        for each in model.log_probabilities(ids[start : start + options.window])
    ]
    (folder / "ids.json").write_text(json.dumps(ids))
    text = ("--text", folder / "ids.json", "--tokens", len(ids), "--window", options.window)
    evaluated = json.loads(_run("llama-eval", "--shards", shards, *text, "--backend", "eager", "--json", "-"))
    return {
        "types": said.split("GGUF, ")[1].split(", ")[0],
        "bytes": path.stat().st_size,
        "theirs": math.exp(-sum(found) / len(found)),
        "ours": evaluated["perplexity"],
        "ids": compared,
    }


def _run(command: str, *arguments: object) -> str:
    done = subprocess.run([SCRIPTS / command, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed")
    return done.stdout


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True, help=".txt, or token ids as .json")
    parser.add_argument("--libraries", type=Path, required=True, help="the folder of llama.cpp's prebuilt libraries")
    parser.add_argument("--gguf-type", choices=["Q8_0", "Q4_0", "F16"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

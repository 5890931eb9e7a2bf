# make demo   set up an environment of its own, record two training paths, compare them
# make test   set up, lint, type-check, check the import contracts, run the tests
# make unsloth    an environment for the path unsloth-mlx (.venv-unsloth); the tests of it run where it exists
# make accuracy    the tool's own benchmark: planted faults, clean pairs, rivals -> docs/accuracy.md
# make calibrate   measure the default tolerances -> differ/defaults.toml
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs accuracy calibrate clean unsloth
demo: $(READY)
	$(BIN)/python -m scenarios.demo

test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

accuracy: $(READY)
	$(BIN)/python -m tests.bench.accuracy

calibrate: $(READY)
	$(BIN)/python -m scenarios.calibrate

docs: $(READY)
	$(BIN)/python -m tracer.format_page > docs/format.md
	$(BIN)/python -m scenarios.config_page > docs/config.md
	$(BIN)/python -m scenarios.catalogue.page > docs/scenarios.md

# unsloth_zoo is LGPL/AGPL and wants older versions of transformers and trl: never a dependency, an environment of its own.
UNSLOTH := .venv-unsloth
UNSLOTH_LIBRARIES := 'mlx==0.32.4' 'mlx-lm==0.32.2' mlx-vlm 'transformers<=5.17.0' 'trl<=1.15.0' 'datasets<5' peft
UNSLOTH_BACKEND := $(if $(filter Darwin,$(shell uname -s)),,'mlx[cpu]==0.32.4')
unsloth: $(UNSLOTH)/.ready
$(UNSLOTH)/.ready: Makefile
	$(PYTHON) -m venv $(UNSLOTH)
	$(UNSLOTH)/bin/python -m pip install --quiet 'torch==2.13.0'
	$(UNSLOTH)/bin/python -m pip install --quiet $(UNSLOTH_BACKEND) $(UNSLOTH_LIBRARIES) click h5py numpy rich xxhash
	$(UNSLOTH)/bin/python -m pip install --quiet --no-deps 'unsloth_zoo==2026.10.9'
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,mlx,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(UNSLOTH) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

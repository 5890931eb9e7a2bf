# make demo   set up an environment of its own, record two training paths, compare them
# make test   set up, lint, type-check, check the import contracts, run the tests
# make accuracy    the tool's own benchmark: planted faults, clean pairs, rivals -> docs/accuracy.md
# make calibrate   measure the default tolerances -> differ/defaults.toml
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs accuracy calibrate clean
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

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,mlx,dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

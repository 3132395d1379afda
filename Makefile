# Everything runs from the virtual environment .venv, which is created once from the pinned versions.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-all ui check check-lowest bench gpu torture clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "embed_assets needs Python 3.11 or newer; '$(PYTHON)' was not found. Name yours: make $(or $(MAKECMDGOALS),install) PYTHON=python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the pinned versions into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@$(BIN)/embed-assets sample
	@$(BIN)/embed-assets sync
	@$(BIN)/embed-assets search "how do I handle an exception" -k 3

# Tests every behaviour once, in minutes.
test: install
	$(BIN)/python -m pytest -m "not long"

# Adds the long tests: clusters, daemons, servers, kills, many seeds. CI runs this.
test-all: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 0 embed_assets_tests/test_architecture.py

# Runs the tests with the lowest versions that pyproject.toml allows: uv resolves them, pip installs them.
LOWEST := .venv-lowest
check-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --extra dev pyproject.toml -o $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/lowest.txt --editable '.[dev]'
	$(LOWEST)/bin/python -m pytest $(ARGS)

ui: install
	@$(BIN)/embed-assets init
	DAGSTER_HOME="$(CURDIR)" $(BIN)/dg dev --host 127.0.0.1

bench: install
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m embed_assets_tests.benchmarks $(DIR)

# Accepts the engine on a CUDA machine, with the Python that has torch there; installs nothing. Writes gpu.json.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m embed_assets_tests.gpu $(ARGS)

torture: install
	$(BIN)/python -m embed_assets_tests.torture $(ARGS)
	$(BIN)/python -m embed_assets_tests.crowd

clean:
	rm -rf .venv .venv-lowest .dagster landing lake

# Everything runs from the virtual environment in .venv, made once from the pinned versions.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test ui check check-lowest bench torture clean

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

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 0 embed_assets_tests/test_architecture.py

# The tests with the lowest versions that pyproject.toml allows: uv names them, pip installs them.
LOWEST := .venv-lowest
check-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --extra dev pyproject.toml -o $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/lowest.txt --editable '.[dev]'
	$(LOWEST)/bin/python -m pytest $(ARGS)

ui: install
	@$(BIN)/embed-assets init
	$(BIN)/dagster dev --host 127.0.0.1

bench: install
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m embed_assets_tests.benchmarks $(DIR)

torture: install
	$(BIN)/python -m embed_assets_tests.torture $(ARGS)
	$(BIN)/python -m embed_assets_tests.crowd

clean:
	rm -rf .venv .venv-lowest .dagster landing lake

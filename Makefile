# Every target makes what it needs: an environment in $(VENV) with the package installed from here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes, a file of tests to one of them at a time; the tests themselves run on one thread.
PYTEST_FLAGS ?= -n 2 --dist loadfile
SOURCES := kernels adapters_store server tests loadtests

.PHONY: demo test lint gpu-test wheel clean

demo: $(VENV)/.installed
	$(BIN)/manylora demo $(DEMO_FLAGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# Runs with $(PYTHON) as it is, installing nothing: a GPU machine brings its own torch. What it
# lacks may lie in a folder named by PYTHONPATH.
gpu-test:
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu-test: torch sees no CUDA device here; nothing was tested")'
	PYTHONPATH=kernels:adapters_store:server:$$PYTHONPATH $(PYTHON) -m pytest -m gpu

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"manylora needs Python 3.11 to 3.13, and {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# Every target makes what it needs: an environment in $(VENV) with the package installed from here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes, a file of tests to one of them at a time; the tests themselves run on one thread.
PYTEST_FLAGS ?= -n 2 --dist loadfile
SOURCES := setup.py kernels adapters_store server tests loadtests
NATIVE := kernels/manylora_kernels/native/src

.PHONY: demo test lint native sanitize gpu-test wheel clean

demo: $(VENV)/.installed
	$(BIN)/manylora demo $(DEMO_FLAGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# The compiled CPU kernels of a checkout; an install has them already where it found a compiler.
native: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet 'setuptools>=77'
	$(BIN)/python setup.py --quiet build_ext --inplace

# The native tests over a build that traps out-of-bounds accesses and undefined behaviour. The
# runtime has to come before Python, and leaks of the interpreter's own are none of ours.
sanitize: $(VENV)/.installed-dev
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -ffp-contract=off -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=undefined \
		-o build/sanitized.so $(NATIVE)/*.cpp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 MANYLORA_NATIVE_LIBRARY=$(CURDIR)/build/sanitized.so \
		$(BIN)/python -m pytest $(wildcard tests/ops/test_native_*.py) \
		tests/engine/test_program.py $(PYTEST_FLAGS)

# Runs with $(PYTHON) as it is, installing nothing: a GPU machine brings its own torch. What it
# lacks may lie in a folder named by PYTHONPATH. GPU_FLAGS='--only kernels,bench' runs a part.
gpu-test:
	PYTHONPATH=$(CURDIR)/kernels:$(CURDIR)/adapters_store:$(CURDIR)/server:$$PYTHONPATH \
		$(PYTHON) tests/gpu/suite.py $(GPU_FLAGS)

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist kernels/manylora_kernels/native/_cpu*.so

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"manylora needs Python 3.11 to 3.13, and {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# One word for each thing that one does here; CI says the same words.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile  # Python compiles what it imports, which is less
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
SOURCES = find csrc tests/emulator -name "*.h" -o -name "*.c??" -o -name "*.cu"
# The tests' other settings are in pyproject.toml and tests/environment.py.
PYTEST := $(RUN) -m pytest -n $(JOBS) --dist worksteal

.PHONY: check check-all check-lowest setup build lint test test-all bench gpu-check format clean

# ------------------------------------------------------------------------------------------------- what a change has to pass
# Each check works in a copy of the tree, with an environment and a build of its own: yours stay as they are.

check:  ## all that a change has to pass, in five minutes; for the CPU alone
	$(PYTHON) .ci/copy_tree.py build/check
	DDPM_FAST_CUDA_ARCHS=none $(MAKE) -C build/check -j 2 setup  # it compiles while pip installs
	$(MAKE) -C build/check lint test

check-all: check-lowest  ## everything: CUDA kernels and their machine code, slow tests, full products, benchmarks' tests, docs
	$(PYTHON) .ci/copy_tree.py build/check-all
	FORCE_CUDA=1 DDPM_FAST_CUDA_ARCHS="80;90a;100" $(MAKE) -C build/check-all -j 2 setup
	$(MAKE) -C build/check-all lint test-all docs

check-lowest:  ## the tests with the lowest versions that pyproject.toml allows (downloads 4 GB the first time)
	$(PYTHON) .ci/copy_tree.py build/check-lowest
	DDPM_FAST_CUDA_ARCHS=none $(MAKE) -C build/check-lowest setup-lowest
	$(MAKE) -C build/check-lowest test

# ------------------------------------------------------------------------------------------------------------ its single parts

setup: $(VENV)/installed build  ## a virtual environment with the package (editable) and what the tests need

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools cmake ninja pybind11
	touch $@

$(VENV)/installed: pyproject.toml $(VENV)/tools
	DDPM_FAST_NO_NATIVE=1 $(PIP) --no-build-isolation -e '.[test]'
	touch $@

setup-lowest: $(VENV)/tools  ## the same with the lowest versions; Triton beside the older one that torch asks for
	$(PYTHON) .ci/lowest.py test > build/lowest.txt
	grep -v ^triton build/lowest.txt | xargs $(PIP)
	grep ^triton build/lowest.txt | xargs $(PIP) --no-deps
	DDPM_FAST_NO_NATIVE=1 $(PIP) --no-build-isolation --no-deps -e .
	touch $(VENV)/installed
	$(MAKE) build

build: $(VENV)/tools  ## compiles what has changed of the native module, in place; build/ keeps the rest
	$(RUN) setup.py -q build_ext --inplace

lint:  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(SOURCES) | xargs $(VENV)/bin/clang-format --dry-run --Werror

test:  ## the tests that `make check` runs
	$(PYTEST)

test-all:  ## all tests: slow ones, full products of parameters, and those of the benchmarks
	$(PYTEST) --full tests benchmarks/tests

bench:  ## images/s of sampling, and every op beside its peers
	$(RUN) benchmarks/sample_speed.py
	$(RUN) -m pytest benchmarks/test_ops.py --benchmark-enable

gpu-check:  ## on a machine with an NVIDIA GPU: build, test and measure in ten minutes
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) benchmarks/gpu_check.py

format:  ## rewrites the sources in the project's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(SOURCES) | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf build $(VENV) ddpm_fast/_native*.so

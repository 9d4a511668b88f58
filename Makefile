# One word for each task. CI uses the same words.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
# Architectures whose machine code has budgets. `make check-all` compiles one or more of each generation.
BUDGETED ?= 80;86;89;90a;100;103;120
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
RUN := $(VENV)/bin/python
# --no-compile: Python compiles the modules that it imports. pip would compile every module of every package.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
# pyproject.toml and tests/helpers/environment.py have the other settings of the tests.
PYTEST := $(RUN) -m pytest -n $(JOBS) --dist worksteal
SOURCES := find csrc tests/emulator -name "*.h" -o -name "*.c??" -o -name "*.cu"

# pip is quiet, so say before it what takes minutes, unless PyTorch is there.
SAY_DOWNLOAD = @$(RUN) -c 'import importlib.util; importlib.util.find_spec("torch") or print( \
	"pip downloads PyTorch and more, up to 3 GB: 4 minutes at 100 Mbit/s. README.md says how to take its CPU build, 160 MB.")'
# Otherwise the last line of `make check` would say which folder make leaves, and not what the tests found.
MAKEFLAGS += --no-print-directory

# Some machines switch bytecode files off. Each process would then compile every module that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: picture check check-all check-lowest lowest-environment setup setup-lowest build lint test test-all machine-code mutations peers bench leaderboard gpu-check gpu-tune wheel docs tour format clean

.DEFAULT_GOAL := check

picture: EXTRAS = train
picture:  ## make an environment with the package (editable), and draw a first picture
	$(MAKE) -j 2 setup EXTRAS=$(EXTRAS)
	$(VENV)/bin/ddpm-fast sample

# Each check works in a copy of the tree, in build/. It has its own environment and build, and leaves yours as they are.
# -j 2: the kernels compile while pip installs.

check:  ## run what a change has to pass, for the CPU alone and without a data set, in 3 to 6 minutes
	rm -f build/check/build/passed.txt
	$(PYTHON) .ci/copy_tree.py build/check
	DDPM_FAST_CUDA_ARCHS=none $(MAKE) -C build/check VENV=.venv -j 2 setup
	$(MAKE) -C build/check VENV=.venv -j 2 lint test OPTIONS="--write-passed=build/passed.txt"

# Tests that passed in `make check` of the same tree do not run again, except those marked `again`.
check-all: check-lowest  ## run everything: CUDA builds, machine code, slow tests, full products, tests of benchmarks, docs
	$(PYTHON) .ci/copy_tree.py build/check-all
	DDPM_FAST_COMPILED_ISAS=all DDPM_FAST_CUDA_ARCHS="80;86;90a;100;120" $(MAKE) -C build/check-all VENV=.venv picture EXTRAS=test,bench,docs
	$(MAKE) -C build/check-all VENV=.venv -j 2 lint test-all docs OPTIONS="$$( \
		cmp -s build/check/build/copied.json build/check-all/build/copied.json && echo --skip-passed=../check/build/passed.txt)"

# Tests marked `sources` find the same with any version of a library. A library's version breaks a call, not one case of many.
check-lowest: lowest-environment  ## run the tests with the lowest versions that pyproject.toml allows
	$(MAKE) -C build/check-lowest VENV=.venv test OPTIONS="-m 'not sources'"

lowest-environment:  ## install the lowest versions for `make check-lowest` (downloads 4 GB)
	$(PYTHON) .ci/copy_tree.py build/check-lowest
	DDPM_FAST_CUDA_ARCHS=none $(MAKE) -C build/check-lowest VENV=.venv -j 2 setup-lowest

setup: $(VENV)/with-$(EXTRAS) build  ## make an environment with the package (editable) and what the tests need

setup-lowest: $(VENV)/lowest build  ## make the same environment with the lowest versions

build: $(VENV)/tools  ## compile what has changed of the native module, in place; build/ keeps the rest
	$(RUN) setup.py -q build_ext --inplace

# setup.py looks for a compiler and for headers. That it lacks them is said before gigabytes of dependencies are downloaded.
$(VENV)/tools:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or later, got " + sys.version + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools cmake ninja pybind11
	$(RUN) setup.py -q build_ext --help >/dev/null
	touch $@

$(VENV)/with-$(EXTRAS): pyproject.toml $(VENV)/tools
	$(SAY_DOWNLOAD)
	DDPM_FAST_NO_NATIVE=1 $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

# torch 2.9 asks for an older Triton than the tests need, so Triton goes in without dependencies.
$(VENV)/lowest: pyproject.toml $(VENV)/tools
	$(PIP) $$($(PYTHON) .ci/lowest.py test | grep -v ^triton=)
	$(PIP) --no-deps $$($(PYTHON) .ci/lowest.py test | grep ^triton=)
	DDPM_FAST_NO_NATIVE=1 $(PIP) --no-build-isolation --no-deps -e .
	touch $@

# It prints errors alone. In `make check` it runs next to the tests, whose summary comes last.
lint:  ## check style and types
	@echo "checking style and types"
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check --quiet .
	@$(RUN) -m mypy --no-error-summary
	@$(SOURCES) | xargs $(VENV)/bin/clang-format --dry-run --Werror

test:  ## run the tests of `make check`
	$(PYTEST) $(OPTIONS)

# The benchmark of the ops then checks results and times nothing.
test-all:  ## run all tests: slow ones, full products of parameters, benchmarks
	$(PYTEST) --full --durations=25 --benchmark-disable -m "not long_benchmark" $(OPTIONS) tests benchmarks/tests benchmarks/ops

machine-code: $(VENV)/with-$(EXTRAS)  ## compile the CUDA kernels for all architectures with budgets, in place, and check their machine code
	DDPM_FAST_CUDA_ARCHS="$(BUDGETED)" $(MAKE) build
	$(PYTEST) --full tests/machine_code

mutations: build  ## check that the tests catch each mutation of mutations.json, in an hour or two
	$(RUN) tests/mutations/run.py

peers:  ## make environments of the peers of benchmark_unet.py that do not fit into one with the others
	$(RUN) benchmarks/peers.py

# Idle threads sleep, so that a busy machine delays each library alike.
bench:  ## time a network here beside the peers that are installed, in five minutes: a table, a plot, build/bench/results.json
	OMP_WAIT_POLICY=passive $(RUN) benchmarks/benchmark_unet.py --quick --dtypes float32 --plot --out build/bench/results.json $(OPTIONS)

leaderboard:  ## train ROW as long as one idle core does in ten minutes, with three seeds, and judge it; it goes on where it was stopped
	$(RUN) benchmarks/leaderboard.py $(ROW) $(OPTIONS)

gpu-check:  ## build, test and measure on a machine with an NVIDIA GPU, in nine minutes
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) benchmarks/gpu_check.py $(OPTIONS)

gpu-tune:  ## time sampling beside torch.compile's max-autotune, in at most an hour; it goes on where it was stopped
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) benchmarks/gpu_check.py --tune $(OPTIONS)

wheel:  ## build a wheel with all CPU and CUDA kernels in build/wheel/dist, and sample with it on a system that has only Python
	$(PYTHON) .ci/wheel.py

# Only docs/hooks.py and the docstrings are read, so nothing is compiled.
docs:  ## build the documentation in build/docs; fail on a broken link or a public name without a page
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(SAY_DOWNLOAD)
	$(RUN) -c "import mkdocs, material, mkdocstrings, ziamath" 2>/dev/null || \
		DDPM_FAST_NO_NATIVE=1 $(RUN) -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "the documentation is in build/docs/index.html"

tour:  ## run examples/tour.py, and write its notebook and its page with their outputs, in three minutes
	$(RUN) -c "import jupytext, nbclient, ipykernel, sklearn" 2>/dev/null || $(MAKE) setup EXTRAS=train,tour
	$(RUN) .ci/tour.py

format:  ## rewrite the sources in the project's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(SOURCES) | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf build $(VENV) ddpm_fast/_native*.so

# One word for each thing that one does here; CI says the same words.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: check setup build lint test test-slow bench gpu-check docs format clean

check: setup lint test  ## all that a change has to pass, from a fresh clone

setup: build  ## a virtual environment with the package (editable) and what the tests need
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	DDPM_FAST_NO_NATIVE=1 $(RUN) -m pip install --quiet -e '.[test]'
	touch $@

build: $(VENV)/installed  ## compiles what has changed of the native module, in place; build/ keeps the rest
	$(RUN) setup.py -q build_ext --inplace

lint:  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	find csrc tests/emulator -name "*.h" -o -name "*.c??" -o -name "*.cu" | xargs $(VENV)/bin/clang-format --dry-run --Werror

test:  ## the test suite
	$(RUN) -m pytest

test-slow:  ## the tests that take minutes
	$(RUN) -m pytest -m slow

bench:  ## images/s of sampling, and every op beside its peers
	$(RUN) benchmarks/sample_speed.py
	$(RUN) -m pytest benchmarks/test_ops.py --benchmark-enable

gpu-check:  ## on a machine with an NVIDIA GPU: build, test and measure in ten minutes
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) benchmarks/gpu_check.py

# Only docs/hooks.py and the docstrings are read, so nothing is compiled.
docs:  ## the documentation, in build/docs; fails on a broken link or a public name without a page
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -c "import mkdocs, material, mkdocstrings, ziamath" 2>/dev/null || \
		DDPM_FAST_NO_NATIVE=1 $(RUN) -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "the documentation is in build/docs/index.html"

format:  ## rewrites the sources in the project's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	find csrc tests/emulator -name "*.h" -o -name "*.c??" -o -name "*.cu" | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf build $(VENV) ddpm_fast/_native*.so

# Everything runs in .venv, made here on first use. On a machine without an NVIDIA card the CPU build of torch is enough:
#   make serve PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
MODEL ?= embedded
ARGS ?=
WORKERS ?= 2
# Whose interpreter the tests of the GPU kernels take (ops/triton/about.py).
TRITON := 3.6.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet $(PIP_ARGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve test abi test-kernels-asan test-slow mutants lint format wheel test-wheel bench bench-rivals soak clean gpu-check

help:
	@echo "make serve   install, start the server on the embedded model (MODEL=..., ARGS='--port 8001 ...')"
	@echo "make test    install, run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make wheel   sdist and manylinux wheel into dist/; make test-wheel installs both where no compiler is, and compares"
	@echo "make mutants   changes the code in one place at a time for 15 minutes, and lists what no test notices"
	@echo "make test-slow | bench | soak   the long ones: slow tests, benchmark of the engine, 10-minute soak"
	@echo "make gpu-check   on an NVIDIA GPU: kernels and engine checked, speeds beside the card's limits (docs/gpu.md)"
	@echo "make bench-rivals   other engines, each in its own environment (20 GB, docs/rivals.md), and Tuili side by side"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tuili needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	@PYTHON=$(PYTHON) sh .ci/venv $(VENV)

KERNELS := CMakeLists.txt $(wildcard src/tuili/ops/cpu/src/*)

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "Installing Tuili into $(VENV) (first time only; torch is large) ..."
	@$(INSTALL) -e . && touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(INSTALL) -e '.[test,dev]'
	@sh .ci/triton $(BIN)/python $(TRITON) $(PIP_ARGS)
	@touch $@

$(VENV)/.installed-release: $(VENV)/.installed
	@$(INSTALL) -e '.[release]' && touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@$(INSTALL) -e '.[bench]' && touch $@

serve: $(VENV)/.installed
	@$(BIN)/tuili serve $(MODEL) $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m slow $(ARGS)

abi: $(VENV)/.installed-dev  # src/abi.h from ops/cpu/contract.py
	@$(BIN)/python -c "from tuili.ops.cpu import abi; abi.HEADER.write_text(abi.header(), 'utf-8')"

mutants: $(VENV)/.installed-dev
	@$(BIN)/python .ci/mutants.py --workers $(WORKERS) $(ARGS)

test-kernels-asan: $(VENV)/.installed-dev
	cmake -S . -B build/asan -DTUILI_SANITIZE=ON && cmake --build build/asan -j 2
	rm -rf build/asan-src && mkdir build/asan-src && cp -r src tests pyproject.toml build/asan-src/
	cp build/asan/_kernels.so build/asan-src/src/tuili/ops/cpu/
	cd build/asan-src && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(CURDIR)/$(BIN)/python $(CURDIR)/.ci/sanitized.py tests/ops_cpu -q -p no:cacheprovider --capture=sys \
	  --timeout 1200

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed-release
	@$(BIN)/python .ci/wheel.py build

test-wheel: $(VENV)/.installed  # of what make wheel left in dist/
	@$(BIN)/python .ci/wheel.py test -- $(PIP_ARGS)

bench: $(VENV)/.installed-bench
	@$(BIN)/python benchmarks/engine.py $(ARGS)

bench-rivals: $(VENV)/.installed-bench
	@cd benchmarks && $(CURDIR)/$(BIN)/python -m rivals $(ARGS)

gpu-check: $(VENV)/.installed-dev $(VENV)/.installed-bench
	@$(BIN)/python benchmarks/gpu/check.py $(ARGS)

soak: $(VENV)/.installed
	@$(BIN)/python benchmarks/soak.py --minutes 10 $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

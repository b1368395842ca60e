# Every target works on its own in a fresh clone: it makes .venv, installs what it needs and builds the package.
#   make demo      train a small GPT with Adam and the three optimizers; table and plot in demo/
#   make test      lint, type check, tests with coverage      (PYTEST_ARGS="--no-cov -x tests/test_examples.py")
#   make lint      ruff and mypy alone
#   make bench     time per optimizer step, host overhead, training steps; into bench/    (BENCH_ARGS="--models resnet50")
#   make wheel     dist/*.whl
#   make figures   the pictures in docs/images, from fresh demo runs and the recorded benchmark results
#   make clean     everything that the targets above wrote, except .venv

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH_OUT ?= bench
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
BUILD_INPUTS := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

EXTRAS_demo := examples
EXTRAS_test := examples,test,lint
EXTRAS_lint := lint
EXTRAS_bench := bench
EXTRAS_figures := examples,bench

.PHONY: demo test lint bench wheel figures clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(VENV)/.ready-demo
	$(BIN)/python examples/train.py --data text --optimizer adam global local smoothed --lr 1e-5 1e-3 \
	    --steps 500 --batch-size 24 --seed 0 --out demo $(DEMO_ARGS)

test: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest --cov $(PYTEST_ARGS)

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

# BENCH_OUT=benchmarks/results records the results that `make figures` puts into the docs.
bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/step_time.py --out $(BENCH_OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/cpu_overhead.py --out $(BENCH_OUT)
	$(BIN)/python benchmarks/end_to_end.py --out $(BENCH_OUT)

# Needs the build tools alone; torch is neither compiled against nor linked.
wheel: $(VENV)/.build-tools
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

figures: demo $(VENV)/.ready-figures
	mkdir -p docs/images
	cp demo/curves.png docs/images/demo.png
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf build dist demo runs bench htmlcov .coverage .coverage.* *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f clara_fused/_core*.so $(VENV)/.ready-*
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.build-tools:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + \
	    ": make PYTHON=/path/to/python3 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "setuptools>=77" wheel "pybind11>=2.13" ninja
	@touch $@

$(VENV)/.torch: $(VENV)/.build-tools
	$(PIP) install --quiet "$(TORCH)"
	@touch $@

# Built without isolation, so that a changed source recompiles what depends on it and nothing else.
$(VENV)/.ready-%: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install --quiet --no-build-isolation --editable ".[$(EXTRAS_$*)]"
	@touch $@

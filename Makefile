# Every target works on its own in a fresh clone: it makes .venv, installs what it needs and builds the package.
#   make demo      train a small GPT with Adam and the three optimizers; table and plot in demo/
#   make test      lint, type check, tests with coverage      (PYTEST_ARGS="--no-cov -x tests/test_examples.py")
#   make lint      ruff and mypy alone
#   make bench     time per optimizer step, host overhead, training steps; into bench/    (BENCH_ARGS="--models resnet50")
#   make wheel     dist/*.whl
#   make study     the learning-rate study, hours; stopped at any time, it goes on where it was  (STUDY_ARGS="--help")
#   make study-quick     a small part of it, minutes
#   make study-figures   pictures and tables of docs/learning_rate.md, from the study's records
#   make figures   tables and plots of README and docs, from the recorded benchmark results
#   make demo-figure   docs/images/demo.png, from a fresh demo run
#   make clean     everything that the targets above wrote, except .venv

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH_OUT ?= bench
DEMO_ARGS ?=
STUDY_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
BUILD_INPUTS := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null) \
    $(addprefix clara_fused/,_version.py _interface.py _core.pyi)

EXTRAS_demo := examples
EXTRAS_test := examples,bench,study,frameworks,test,lint
EXTRAS_lint := lint
EXTRAS_bench := bench
EXTRAS_figures := bench
EXTRAS_study := examples,bench,study

.PHONY: demo test lint bench wheel figures demo-figure study study-quick study-figures clean
.DELETE_ON_ERROR:
.SECONDARY:

# One thread: the model is too small to gain from more, and the same numbers come out whatever the machine's cores.
demo: $(VENV)/.ready-demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/train.py --data text --optimizer adam global local smoothed --lr 1e-5 1e-3 \
	    --steps 500 --batch-size 24 --seed 0 --out demo $(DEMO_ARGS)

test: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest --cov -n auto $(PYTEST_ARGS)

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

figures: $(VENV)/.ready-figures
	$(BIN)/python benchmarks/figures.py

demo-figure: demo
	mkdir -p docs/images
	cp demo/curves.png docs/images/demo.png

study: $(VENV)/.ready-study
	$(BIN)/python benchmarks/lr_robustness.py run full $(STUDY_ARGS)
	$(BIN)/python benchmarks/lr_robustness.py run measured $(STUDY_ARGS)
	$(BIN)/python benchmarks/lr_robustness.py run cautious $(STUDY_ARGS)
	$(BIN)/python benchmarks/lr_robustness.py run sweep $(STUDY_ARGS)
	$(BIN)/python benchmarks/lr_robustness.py run candidates $(STUDY_ARGS)

study-quick: $(VENV)/.ready-study
	$(BIN)/python benchmarks/lr_robustness.py run quick --results build/study-quick.jsonl $(STUDY_ARGS)

study-figures: $(VENV)/.ready-study
	$(BIN)/python benchmarks/lr_robustness.py random-walk
	$(BIN)/python benchmarks/lr_robustness.py figures

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

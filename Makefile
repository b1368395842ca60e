# Every target works on its own in a fresh clone: it makes .venv, installs what it needs and builds the package.
#   make demo      train a small GPT with Adam and the three optimizers; table and plot in demo/
#   make test      what CI runs: lint, type check, tests with coverage, test-processors
#                  (PYTEST_ARGS="--no-cov -x tests/programs/test_examples.py")
#   make lint      ruff, mypy and actionlint (the pipelines) alone
#   make test-processors   the fast tests again, as they run on another kind of processor than this one
#   make test-aarch64      the C++ core on an emulated Arm processor; needs g++-aarch64-linux-gnu and qemu-user
#   make bench     time per optimizer step, host overhead, bytes of state; into bench/    (BENCH_ARGS="--models resnet50")
#   make docs      the documentation site, into build/site/
#   make wheel     dist/*.whl, for this machine's Python
#   make sdist     dist/*.tar.gz
#   make test-wheel        a wheel from the sdist, tried in a fresh environment without a compiler
#   make study     the learning-rate study, hours; stopped at any time, it goes on where it was  (STUDY_ARGS="--help")
#   make study-quick     a small part of it, minutes
#   make study-figures   pictures and tables of the docs, from the study's records
#   make figures   tables and plots of README and docs, from the recorded benchmark results
#   make demo-figure   docs/images/demo.png, from a fresh demo run
#   make clean     everything that the targets above wrote, except .venv*
#
# Versions are those of constraints.txt, which were tested together. Others go to an environment of their own:
#   make test CONSTRAINTS=                                                     the newest of everything
#   make test CONSTRAINTS=constraints-oldest.txt PYTHON=python3.10             the oldest that are supported

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH_OUT ?= bench
DEMO_STEPS ?= 200
DEMO_ARGS ?=
STUDY_ARGS ?=

VENV := $(if $(filter constraints.txt,$(CONSTRAINTS)),.venv,.venv-$(or $(CONSTRAINTS:constraints-%.txt=%),newest))
BIN := $(VENV)/bin
# What is imported is compiled to byte code then; to do so for all of PyTorch takes half a minute.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile --prefer-binary \
    $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade --upgrade-strategy eager)
NEWS_ONLY := | { grep --line-buffered -v "already satisfied" || true; }
# The core and the package's metadata are made again when one of these has changed.
BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -type f) $(shell find clara_fused -name '*.pyi') \
    clara_fused/_version.py

EXTRAS_demo := examples
EXTRAS_test := examples,bench,study,frameworks,test,lint,docs
EXTRAS_lint := lint
EXTRAS_bench := bench
EXTRAS_figures := bench
EXTRAS_study := examples,bench,study
EXTRAS_docs := docs

.PHONY: demo test lint actionlint test-processors test-aarch64 bench docs wheel sdist test-wheel figures demo-figure study \
    study-quick study-figures clean
.DELETE_ON_ERROR:
.SECONDARY:

# One thread: the model is too small to gain from more, and the same numbers come out whatever the machine's cores.
demo: $(VENV)/.ready-demo
	@echo "== training, from two learning rates with each of four optimizers (about a minute and a half)"
	OMP_NUM_THREADS=1 $(BIN)/python examples/train.py --data text --optimizer adam global local smoothed --lr 1e-5 1e-3 \
	    --steps $(DEMO_STEPS) --batch-size 24 --seed 0 --out demo $(DEMO_ARGS)

define LINT
	@echo "== lint (half a minute)"
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	@$(ACTIONLINT)
endef

ACTIONLINT = if [ -x $(BIN)/actionlint ]; then echo $(BIN)/actionlint; $(BIN)/actionlint; fi

define TEST_PROCESSORS
	@echo "== the fast tests, as on another kind of processor (four minutes)"
	$(BIN)/python tests/processors.py tests/optimizer tests/core
endef

test: $(VENV)/.ready-test
	$(LINT)
	@echo "== all tests (twenty minutes on two cores)"
	$(BIN)/python -m pytest --cov -n auto --dist loadgroup $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(TEST_PROCESSORS))

lint: $(VENV)/.ready-lint
	$(LINT)

actionlint: $(VENV)/.ready-lint
	@$(ACTIONLINT)

test-processors: $(VENV)/.ready-test
	$(TEST_PROCESSORS)

test-aarch64: $(VENV)/.ready-test
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null || \
	    { echo "needs an Arm compiler and emulator: apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	@echo "== the C++ core, compiled for Arm and run in an emulator (about three minutes)"
	$(BIN)/python -m pytest -v tests/programs/test_processors.py -k aarch64

# BENCH_OUT=benchmarks/results records the results that `make figures` puts into the docs.
bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/step_time.py --out $(BENCH_OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/cpu_overhead.py --out $(BENCH_OUT)
	$(BIN)/python benchmarks/state_bytes.py --out $(BENCH_OUT)

docs: $(VENV)/.ready-docs
	@echo "== documentation site (ten seconds)"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site
	@echo "build/site/index.html"

# Needs the build tools alone; torch is neither compiled against nor linked.
wheel: $(VENV)/.build-tools
	@echo "== wheel (about a minute for the CPU, on two cores; half a minute more for each kind of GPU)"
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

sdist: $(VENV)/.build-tools
	$(BIN)/python -c "import setuptools.build_meta as build; print('dist/' + build.build_sdist('dist'))"

test-wheel: sdist
	sh .ci/try_wheel.sh $(PYTHON) dist/*.tar.gz $(CONSTRAINTS)

figures: $(VENV)/.ready-figures
	$(BIN)/python benchmarks/figures.py

demo-figure: DEMO_STEPS := 500
demo-figure: demo
	mkdir -p docs/images
	cp demo/curves.png docs/images/demo.png

study: $(VENV)/.ready-study
	$(BIN)/python -m study run $(STUDY_ARGS)

study-quick: $(VENV)/.ready-study
	$(BIN)/python -m study run quick $(STUDY_ARGS)

study-figures: $(VENV)/.ready-study
	$(BIN)/python -m study figures

clean:
	rm -rf build dist demo runs bench htmlcov .coverage .coverage.* *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f .venv*/.ready-*
	find clara_fused -name '_core*.so' -delete
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# --- the environment -------------------------------------------------------------------------------------------------

$(VENV)/.build-tools: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + \
	    ": make PYTHON=/path/to/python3 ..." if sys.version_info < (3, 10) else 0)'
	@echo "== a Python environment in $(VENV), and build tools (ten seconds)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --quiet setuptools wheel pybind11 ninja
	@touch $@

$(VENV)/.torch: $(VENV)/.build-tools
	@echo "== PyTorch (0.2 to 3 GB to download, then about half a minute)"
	@$(PIP_INSTALL) torch
	@touch $@

# Built without isolation, so that a changed source recompiles what depends on it and nothing else.
$(VENV)/.ready-%: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "== the compiled core (about a minute for the CPU, on two cores; half a minute more for each kind of GPU)"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@echo "== packages for this target, and clara_fused itself (half a minute once downloaded)"
	@$(PIP_INSTALL) --no-build-isolation --editable ".[$(EXTRAS_$*)]" $(NEWS_ONLY)
	@touch $@

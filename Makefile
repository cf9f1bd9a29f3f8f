# On a fresh machine (python3 with venv, g++, make, git) `make demo` and `make test` are all there is to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py CMakeLists.txt pyproject.toml
LINTED := engine kernels bench demo tests setup.py
CPP := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.h' 2>/dev/null)

# `make gpu` runs where nothing can be installed: the Python that has the CUDA build of torch.
GPU_PYTHON ?= $(PYTHON)

# As root on Debian or Ubuntu: what the tests with two nodes on one machine need; without it they are skipped.
NODE_PACKAGES := openssh-server openssh-client iproute2 pdsh numactl slurmctld slurmd slurm-client munge shellcheck

.PHONY: setup two-nodes demo demo-long test test-full fuzz lint format bench gpu clean

setup: $(VENV)/.built

$(VENV)/.requirements: requirements.txt requirements-no-deps.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps -r requirements-no-deps.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@

two-nodes:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(NODE_PACKAGES)

demo: setup
	$(PY) demo/fetch.py
	$(PY) demo/run.py

demo-long: setup
	$(PY) demo/fetch.py
	$(PY) demo/run.py --long

test: setup
	$(PY) demo/fetch.py --quiet
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-full: setup
	$(PY) demo/fetch.py --quiet
	$(PY) -m pytest -n 2 --dist loadfile -m "not gpu"

# every reader of foreign input, for a while; FUZZ_SECONDS=3600 for longer
FUZZ_SECONDS ?= 300
fuzz: setup
	$(PY) tests/fuzz/long.py --seconds $(FUZZ_SECONDS)

lint: setup
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(CPP)

# 25 minutes for the ops and five for the training step, on two cores. BENCH_SECONDS=3600 leaves nothing out.
BENCH_SECONDS ?= 1500
bench: setup
	$(PY) -m bench --threads 1 2 --seconds $(BENCH_SECONDS)
	$(PY) -m bench.training_step --threads 1 2
	$(PY) -m bench.plot

gpu:
	$(GPU_PYTHON) bench/gpu.py

clean:
	rm -rf $(VENV) build dist demo-runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find engine kernels -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

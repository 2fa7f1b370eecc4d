# `make demo` and `make test` are each enough by themselves: the first one sets up .venv.

PYTHON ?= python3
VENV := .venv/bin/python
STAMP := .venv/.set-up
INSTALL := $(VENV) -m pip -qq --disable-pip-version-check install -c tools/constraints.txt

.PHONY: help setup demo test test-docs lint clean

help:
	@echo "make demo    distil a detector on the embedded data set, on a CPU, in minutes"
	@echo "make test    run the tests"
	@echo "make test-docs  try what the documentation shows, exports, the report in a browser, and"
	@echo "             runs of several processes"
	@echo "make lint    check style and formatting (ruff)"
	@echo "make faults  kill runs, fill disks, damage files: under half an hour"
	@echo "make fuzz    10 000 wrong configs (COUNT=..., SEED=...)"
	@echo "make setup   only set up .venv: the tested versions of everything, 5 GB"
	@echo "make clean   remove .venv and what builds and tests left behind; keeps output/ and datasets/"
	@echo "PYTHON=...   the Python to make .venv with (default: python3)"

setup: $(STAMP)

demo: $(STAMP)
	$(VENV) tools/demo.py

# One process per core, one thread in each: the detectors of the tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --dist loadfile

test: $(STAMP)
	$(PYTEST)

test-docs: $(STAMP)
	$(PYTEST) -m 'docs or processes'

lint: $(STAMP)
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

faults: $(STAMP)
	$(VENV) -W ignore tests/faults

COUNT ?= 10000
SEED ?= 0
fuzz: $(STAMP)
	$(VENV) -W ignore tools/fuzz_configs.py --count $(COUNT) --seed $(SEED)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so that a set-up that was interrupted starts again.
$(STAMP): setup.py pyproject.toml tools/constraints.txt d2kd/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: the tested \
	versions need Python 3.11 or newer, and '$(PYTHON)' is not: name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual \
	environments: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(VENV) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing torch and torchvision (4.8 GB with their CUDA libraries, about a minute) ..."
	@$(INSTALL) pip setuptools wheel
	@$(INSTALL) torch torchvision
	@echo "Installing d2kd and the libraries it uses ..."
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@PIP_CONSTRAINT=tools/constraints.txt $(VENV) -m d2kd.install_detectron2
	@touch $@

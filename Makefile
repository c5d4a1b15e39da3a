# Every target sets up what it needs in .venv. The set-up runs once, and again when pyproject.toml changes.

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
ASSETS := $(or $(LAROSA_ASSETS),.cache/assets)
FETCHED := $(ASSETS)/.fetched

.PHONY: install demo test check lint browser clean

install: $(INSTALLED) $(FETCHED)

# torch goes first and alone: where the package index offers a +cpu build of this version, pip prefers it, and
# the second command then finds its torch requirement met instead of choosing a newer build with CUDA.
$(INSTALLED): pyproject.toml
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install "torch==2.13.0"
	$(PYTHON) -m pip install -e ".[dev,gguf]"
	touch $@

# A stamp of its own: the model is no reason to fetch again when only a dependency changed.
$(FETCHED): benchmarks/assets.py | $(INSTALLED)
	$(PYTHON) -m benchmarks.assets
	touch $@

demo: install
	$(PYTHON) -m benchmarks.demo

lint: $(INSTALLED)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

# Lint is a part of it, so that the one command in the README, which CI runs too, leaves nothing unchecked.
test: install lint
	$(PYTHON) -m pytest -n logical --dist loadfile

check: test

# A browser for the tests that look at the report page; without one they are skipped, and say so. Needs the right to
# install packages, and a distribution that has this one.
browser:
	command -v chromium chromium-browser google-chrome || { apt-get update && apt-get install -y chromium; }

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

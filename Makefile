# Two commands on a bare clone: `make train` and `make test`. Needs make and Python 3.11 or newer.
#   make train FILTER=sustainability_tech_deployment ARGS='-p epochs 5'
#   make test ARGS='-k readme'
PYTHON ?= python3
FILTER ?= uplifting
OUT ?= out.ipynb
ARGS ?=
READY := .venv/ready

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test readme clean

help: ## Show this list
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1	\2/p' Makefile

setup: $(READY) ## Create .venv and install the package with the tested versions, once
	@echo "== Set up: .venv holds leximl and what it needs"

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "leximl needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12"; exit 1; }
	@echo "== Setting up .venv with $$($(PYTHON) --version); the first time takes a few minutes and about 2.5 GB"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev]'
	@touch $@

train: $(READY) ## Train a filter: FILTER=uplifting OUT=out.ipynb ARGS='-p epochs 5'
	@echo "== Training the filter '$(FILTER)'; the executed notebook will be $(OUT)"
	@.venv/bin/python -m papermill nbs/train.ipynb $(OUT) -p filter $(FILTER) $(ARGS)
	@echo "== Done: read $(OUT), filters/$(FILTER)/ and reports/"

test: $(READY) ## Run every test; ARGS='-k TEXT' runs those whose name holds TEXT
	@echo "== Testing"
	@.venv/bin/python tests/run.py $(ARGS)

readme: $(READY) ## Write README.md from nbs/index.ipynb
	@.venv/bin/python tests/readme.py

clean: ## Remove .venv, caches and built pages; filters/, reports/ and runs/ stay
	rm -rf .venv build _docs _proc *.egg-info .mypy_cache .ruff_cache .pytest_cache out.ipynb
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

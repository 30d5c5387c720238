# Every target sets up .venv by itself. `make help` lists them.
#
# PYTHON: the interpreter that .venv is made with, 3.11 or newer.
PYTHON ?= $(shell for p in python3.11 python3 python3.13 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready

.PHONY: help setup book test lint format lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1 /p' Makefile | while read -r name text; do \
		printf '  make %-8s %s\n' "$$name" "$$text"; done

setup: $(READY) ## make .venv with the exact packages of requirements.lock

# pip, not uv: pip reads the pip.conf of a classroom or company machine, and so its package index.
# setuptools, which builds our own package, comes from the lock too: hence --no-build-isolation.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install it, or run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv: a few minutes, and on Linux about 6 GB on disk."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

# --all: Sphinx shows the warnings of a page only when it reads that page anew.
book: $(READY) ## render the book into _build/html
	$(BIN)/jupyter-book build --all --warningiserror --keep-going .

test: lint ## check style and types, then run every test
	$(BIN)/python -m pytest

lint: $(READY) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## correct what can be corrected automatically
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# torch 2.13 is avoided on purpose: next to some of its files torchvision cannot be imported.
# To move every other package to its newest version, delete requirements.lock first.
lock: ## write requirements.lock anew from pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	printf 'torch==2.15.0\ntorchvision==0.29.2\n' | $(BIN)/uv pip compile pyproject.toml \
		--extra dev --constraint - --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock

clean: ## remove the rendered book and the tools' caches (not .venv, not data/)
	rm -rf _build build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up .venv by itself. `make help` lists them.
#
# PYTHON: the interpreter that .venv is made with, 3.11 or newer.
PYTHON ?= $(shell for p in python3.11 python3 python3.13 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
# What the pages run in the browser, and the browser that tests them; node comes with .venv.
PAGES := node_modules/.package-lock.json
NPM := PATH="$(CURDIR)/$(BIN):$$PATH" npm --no-audit --no-fund --ignore-scripts --loglevel=error

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
EXECUTE := $(BIN)/jupyter nbconvert --to notebook --execute --log-level ERROR \
	--CoalesceStreamsPreprocessor.enabled=True \
	--ExecutePreprocessor.record_timing

.PHONY: help setup book pdf epub test stress bench lint format sync repository lock clean
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

$(PAGES): package.json package-lock.json $(READY)
	$(NPM) ci

# Every notebook runs once more, beside the committed one: what a reader sees must still run.
# --all: Sphinx shows the warnings of a page only when it reads that page anew.
book: $(NOTEBOOKS:notebooks/%=_build/run/%) $(PAGES) ## run the notebooks and render the book into _build/html
	$(BIN)/jupyter-book build --all --warningiserror --keep-going .
	$(BIN)/python live/build.py _build/html
	$(MAKE) epub pdf

pdf: _build/html/intro.html ## print the rendered book as one PDF
	$(BIN)/python _ext/pdf.py _build/html

epub: _build/html/intro.html ## pack the book as an EPUB
	$(BIN)/jupyter-book build --warningiserror --builder custom --custom-builder epub .
	cp _build/epub/*.epub _build/html/

_build/html/intro.html: | $(PAGES)
	$(BIN)/jupyter-book build --warningiserror --keep-going .

_build/run/%.ipynb: notebooks/%.ipynb $(wildcard simplenet_lib/*.py) $(READY)
	$(EXECUTE)=True --output-dir _build/run $<

test: lint $(PAGES) ## check style and types, then run every test and compare every notebook
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbval notebooks/

stress: $(READY) ## 10,000 damaged files, 20 killed trainings: what `make test` does in small
	KILLS=20 $(BIN)/python -m pytest --hypothesis-profile stress \
		-k "changed or any_folders or killed"

# DATA=ROOT/CATEGORY: images for the measurements that train, `bottle` of MVTec AD in the README.
bench: $(READY) ## measure speed and memory as ratios, on a machine that does nothing else
	$(BIN)/python benchmarks/speed.py $(if $(DATA),--data $(DATA))
	$(if $(DATA),$(BIN)/python benchmarks/peers.py $(DATA))

lint: $(READY) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## correct what can be corrected automatically
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/typer simplenet_lib.cli utils docs --name simplenet --title "The command" \
		--output reference/command.md

# The text is the source: edit notebooks/py/NAME.py, then `make sync NOTEBOOKS=notebooks/NAME.ipynb`.
sync: $(READY) ## build the notebooks from notebooks/py and run them, with outputs
	for notebook in $(NOTEBOOKS); do \
		$(BIN)/jupytext --quiet --to ipynb --update --output $$notebook \
			notebooks/py/$$(basename $$notebook .ipynb).py && \
		$(EXECUTE)=False --inplace $$notebook || exit 1; done

# Setup cells need the address, too; tests/test_book.py checks that they agree.
repository: ## write the repository's address everywhere: URL=https://github.com/...
	@case "$(URL)" in https://github.com/?*/?*) ;; *) echo "make repository URL=https://github.com/NAME/REPOSITORY" >&2; exit 2 ;; esac
	OLD=$$(sed -n 's#^  url: https://github.com/##p' _config.yml) NEW=$(URL:https://github.com/%=%) \
		perl -pi -e 's{github\.com/\Q$$ENV{OLD}\E}{github.com/$$ENV{NEW}}g' \
		_config.yml $(NOTEBOOKS) $(NOTEBOOKS:notebooks/%.ipynb=notebooks/py/%.py)

# torch 2.13 is avoided on purpose: next to some of its files torchvision cannot be imported.
# To move every other package to its newest version, delete requirements.lock first.
lock: ## write requirements.lock and package-lock.json anew
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	printf 'torch==2.15.0\ntorchvision==0.29.2\n' | $(BIN)/uv pip compile pyproject.toml \
		--extra dev --constraint - --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock
	$(NPM) install --package-lock-only --omit-lockfile-registry-resolved

clean: ## remove the rendered book and the tools' caches (not .venv, not data/)
	rm -rf _build build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

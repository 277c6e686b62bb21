# Everything a developer does, from a fresh clone, with nothing but make and a Python with venv and pip.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Other Pythons that are tested where they are found.
PYTHONS = 3.12 3.13
PYTEST_ARGS ?=
BENCH_ARGS ?=
# The programs among benchmarks/; the other files there are their parts.
BENCHMARKS = $(wildcard $(patsubst %,benchmarks/%.py,overhead redis workers client storm))

.DEFAULT_GOAL := help
.PHONY: help demo test test-only test-all test-oldest lint format bench docs clean check-python

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12 names another interpreter, PYTEST_ARGS and BENCH_ARGS are passed on."

demo: $(VENV)/.installed ## see it work: four acts in half a minute, and a page with plots: seawall-demo.html
	@$(BIN)/seawall demo

test: $(VENV)/.installed ## the tests, with branch coverage of at least 95 %
	@$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

test-only: $(VENV)/.installed
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(addprefix test-,$(PYTHONS)) ## the tests on the other supported Pythons that are found here

# A pyenv shim is on PATH even where it leads nowhere, so an interpreter counts once it has run.
test-3.%:
	@for python in python3.$* "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$*.*/bin/python; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, $*))' 2>/dev/null; then \
	    echo "== Python 3.$*"; \
	    exec $(MAKE) --no-print-directory test-only PYTHON="$$python" VENV=.venv-3.$*; \
	  fi; \
	done; echo "== Python 3.$*: left out, there is no such interpreter on PATH or in pyenv"

test-oldest: .venv-oldest/.installed ## the tests on the oldest supported version of every dependency
	@echo "== oldest supported versions: $$(tr '\n' ' ' < .venv-oldest/.installed)"
	@# What an old release warns about is not ours to mend.
	@.venv-oldest/bin/python -m pytest -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff, mypy --strict, the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict src $(wildcard tests/typing)
	$(BIN)/lint-imports

format: $(VENV)/.installed ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv-bench/.installed ## the benchmarks, beside other limiters
	@test -n "$(BENCHMARKS)" || echo "benchmarks/ holds nothing to run"
	@set -e; for file in $(BENCHMARKS); do \
	  echo "== $$file $(BENCH_ARGS)"; PYTHONPATH=. .venv-bench/bin/python "$$file" $(BENCH_ARGS); done
	@echo "== overload, simulated"; PYTHONPATH=. .venv-bench/bin/python -m benchmarks.overload
	@echo "== overload, on real servers"; PYTHONPATH=. .venv-bench/bin/python -m benchmarks.overload.real
	@.venv-bench/bin/python benchmarks/readme.py

docs: $(VENV)/.installed ## the documentation, as a site in build/docs; whatever is wrong in it is an error
	@$(BIN)/python docs/generate.py
	@$(BIN)/sphinx-build -W --keep-going -n -q -b html docs build/docs
	@echo "built: build/docs/index.html"

clean: ## remove environments, caches and build results
	rm -rf .venv .venv-* build dist htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f seawall-demo.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@$(PYTHON) -c '' 2>/dev/null || { \
	  echo "'$(PYTHON)' does not run. Seawall needs Python 3.11 or newer: make PYTHON=/path/to/python ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1); Seawall needs 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# Environments are made anew when pyproject.toml changes; the package itself is editable.
%/.installed: EXTRA = dev
.venv-bench/.installed: EXTRA = bench
%/.installed: pyproject.toml | check-python
	@test -x $(@D)/bin/pip || { rm -rf $(@D); $(PYTHON) -m venv $(@D); }
	@echo "installing seawall[$(EXTRA)] into $(@D), about a minute ..."
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRA)]"
	@$(@D)/bin/python --version && touch $@

.venv-oldest/.installed: pyproject.toml .ci/oldest.py | check-python
	@test -x $(@D)/bin/pip || { rm -rf $(@D); $(PYTHON) -m venv $(@D); }
	@echo "installing the oldest supported versions into $(@D), about a minute ..."
	@$(PYTHON) .ci/oldest.py > $(@D)/oldest.txt
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -r $(@D)/oldest.txt
	@mv $(@D)/oldest.txt $@

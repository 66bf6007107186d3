# Every target sets itself up with pip. All that has to be there is Python, 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
# The peers live apart from the library and its tests. BENCH=--quick takes under five minutes;
# EXAMPLES may name some of them, and takes --short.
BENCH ?=
EXAMPLES ?=
PIP_INSTALL = -m pip --disable-pip-version-check --quiet install

.PHONY: test demo examples lint bench clean
.DEFAULT_GOAL := test

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

demo: $(VENV)/.examples
	$(VENV)/bin/python examples/japanese_vowels.py

examples: .venv-examples/.peers
	.venv-examples/bin/python examples/run.py $(EXAMPLES)

lint: $(VENV)/.dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

bench: $(BENCH_VENV)/.stamp
	$(BENCH_VENV)/bin/python -m benchmarks.peers $(BENCH)
	$(BENCH_VENV)/bin/python -m benchmarks.never_slower $(BENCH)
	$(BENCH_VENV)/bin/python -m benchmarks.render

clean:
	rm -rf .venv* dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp per set of extras, so that a second call installs nothing.
define install_extras
	@echo "installing jaxrnn[$*] into $(@D)"
	@$(@D)/bin/python $(PIP_INSTALL) -e '.[$*]'
	@touch $@
endef

$(VENV)/.%: pyproject.toml | $(VENV)/bin/pip
	$(install_extras)

.venv-examples/.%: pyproject.toml | .venv-examples/bin/pip
	$(install_extras)

$(BENCH_VENV)/.stamp: benchmarks/requirements.txt pyproject.toml | $(BENCH_VENV)/bin/pip
	@echo "installing the peers into $(BENCH_VENV)"
	@$(BENCH_VENV)/bin/python $(PIP_INSTALL) -e . -r benchmarks/requirements.txt
	@touch $@

# pip comes last into an environment: one without it was left unfinished and is completed.
.PRECIOUS: %/bin/pip
%/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxrnn needs Python 3.11 or newer, which '$(PYTHON)' is not ($$($(PYTHON) --version 2>&1))." >&2; \
	  echo "Name one that is, for instance: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $*

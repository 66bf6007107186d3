# Every target makes what it needs in $(VENV) with pip; nothing else has to be installed.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: test demo examples lint bench clean
.DEFAULT_GOAL := test

# One stamp per set of extras, so that a second call installs nothing.
$(VENV)/.%: pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing jaxrnn[$*] into $(VENV)"
	@$(PIP) install -e '.[$*]'
	@touch $@

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n auto

demo: $(VENV)/.examples
	$(VENV)/bin/python examples/japanese_vowels.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf .venv* dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

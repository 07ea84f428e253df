# Needs Python 3.11 or newer, make and git. Everything else goes into .venv, pinned.
PYTHON ?= python3
ENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: repro test lint check lock clean

repro: .venv/installed
	@$(ENV) dvc repro
	@$(ENV) dvc status -q || (echo "dvc status: the run is not complete in the cache (disk full?); free space, then dvc commit -f" >&2; exit 1)
	@$(ENV) distill report

test: .venv/installed
	$(ENV) pytest

lint: .venv/installed
	$(ENV) ruff check .
	$(ENV) ruff format --check .
	$(ENV) mypy

check: lint test

.venv/installed: requirements.lock requirements-teacher.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps --requirement requirements-teacher.txt
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Keeps the pins that still fit; delete requirements.lock first to take the newest of everything.
lock: pyproject.toml
	.venv/bin/uv pip compile --quiet --python-version 3.11 --extra dev pyproject.toml \
	  --no-header --output-file requirements.lock

clean:
	rm -rf .venv

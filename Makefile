# make bench and make test need Python and a C++ compiler, nothing else. They use the active virtual environment, or
# create .venv. TORCH=... chooses another torch, or TORCH= keeps the one that is installed.
TORCH ?= torch==2.13.0
PYTHON ?= python3
SIZE ?= 224
PEERS ?= all
# all: also torch.compile, which takes minutes for each of its problems
GPU_PEERS ?= quick
TRITON_TARGETS ?= sm_80 sm_90 gfx942

ifdef VIRTUAL_ENV
  VENV := $(VIRTUAL_ENV)
else
  VENV := .venv
endif
BIN := $(VENV)/bin

# Setting up is done once per environment, checkout and torch, and again when something that is built has changed.
STAMP := $(VENV)/.mirage-kernels$(subst /,-,$(CURDIR))-$(subst /,-,$(subst =,-,$(TORCH)))
BUILT := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: help setup bench test benchmarks measured docs peers bench-gpu lint lab-test ctest triton cuda wheel clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BUILT) | $(BIN)/python
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	MIRAGE_CUDA_EMULATED=1 $(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch "$@"

setup: $(STAMP)  ## install torch, then the package with everything that tests and benchmarks need

bench: setup  ## the main job: the paper's Table 6 with our modules beside it
	$(BIN)/mirage table6 --size $(SIZE)

test: setup  ## the whole test suite, on all cores
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto

benchmarks: setup  ## operators, network and Table 6, and out/benchmarks.md
	$(BIN)/pytest benchmarks/test_operators.py benchmarks/test_model.py benchmarks/test_table6.py --benchmark-only \
	  --benchmark-json=out/benchmarks.json
	$(BIN)/python -m benchmarks.report out/benchmarks.json

measured: setup  ## the figures of docs/measured.md and the README: five minutes on a quiet machine
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	$(BIN)/python -m benchmarks.measured

peers: setup  ## the CPU path beside ONNX Runtime, OpenVINO and others, stages beside their floors, and out/cpu-peers.md
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	$(BIN)/pytest benchmarks/test_cpu_peers.py benchmarks/test_stages.py --benchmark-only --peers $(PEERS) \
	  --benchmark-json=out/cpu-peers.json
	$(BIN)/python -m benchmarks.peers_report out/cpu-peers.json

bench-gpu:  ## on a CUDA machine, in the active environment: GPU tests, benchmarks, and benchmarks/results/<gpu>-<date>.json
	$(PYTHON) -m pytest -m gpu
	for tool in memcheck racecheck; do if command -v compute-sanitizer > /dev/null; then \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -m gpu tests/kernels/test_cuda.py || exit 1; \
	else echo "no compute-sanitizer: without $$tool"; fi; done
	$(PYTHON) -m pytest benchmarks/test_gpu.py benchmarks/test_operators.py benchmarks/test_table6.py --benchmark-only \
	  --device cuda --peers $(GPU_PEERS) --benchmark-json=out/gpu.json
	$(PYTHON) -m benchmarks.gpu_report out/gpu.json

lab-test: setup  ## the tests of lab/, which make test leaves out
	$(BIN)/pytest lab/tests

lint: setup  ## ruff, mypy, and whether the generated pages are of the present code
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.measured_page

# The reference is read from the sources, so the package itself need not be built.
docs: | $(BIN)/python  ## the manual, in out/site; a warning is an error
	$(BIN)/python -m pip install --quiet $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

ctest: setup  ## the C++ tests, on the kernels that the installation has compiled
	build=build/cmake-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)') && \
	$(BIN)/cmake -S . -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMIRAGE_BUILD_PYTHON=OFF \
	  -DMIRAGE_BUILD_TESTS=ON -DMIRAGE_TEST_PYTHON=$(abspath $(BIN))/python && \
	$(BIN)/cmake --build $$build && $(BIN)/ctest --test-dir $$build --output-on-failure

triton: setup  ## compile every Triton kernel for sm_80, sm_90 and gfx942 without a GPU
	$(BIN)/python -m tools.compile_triton --target $(TRITON_TARGETS)

cuda: setup  ## the kernels that nvcc has compiled for sm_80 and sm_90: registers, spills, shared memory, occupancy
	$(BIN)/python tools/cuda_resources.py --sass

wheel: setup  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist out *.egg-info mirage_kernels/_native*.so mirage_kernels/_cuda*.so $(VENV)/.mirage-kernels*

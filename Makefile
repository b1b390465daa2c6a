# The commands of this project, from a fresh clone on: `make help`.

PYTHON ?= python3
# Another package index for torch, such as PyTorch's own for CPU-only builds.
TORCH_INDEX_URL ?=
# Arguments for `make bench`, e.g. SUITE="memory --quick".
SUITE ?= meta-step
# Arguments for `make compile-report`: --update replaces the tables.
REPORT ?=

# An interpreter that has a torch for its GPU, for the targets on one, e.g. WITH=python3: nothing is installed into it.
WITH ?=
# What `make gpu` does, most telling first; what is done is not done again until `make gpu-again`, and what was begun and
# not finished comes last, whatever stopped it. Each is also a target of its own: `make build/gpu/headline`.
STAGES ?= build configs headline price paper sanitize tests inner train memory long flat gqa sweep cross-entropy ops
# When it starts nothing more: the same command goes on later.
GPU_MINUTES ?= 10
# GPU_DRY=1 goes through the stages without a GPU, on tiny shapes and the CPU, and stores nothing.
GPU_DRY ?=
# What such a machine lacks, brought along: `make gpu-pack`, for the Python that it has.
PACK ?= build/gpu-pack
PACK_PYTHON ?= 3.12
# Processes of the tests on a GPU: compilation is what takes their time.
JOBS ?= 8
# Arguments for `make tune`, e.g. TUNE="--kernel dual_backward_keys --dtype half --head-dim 128".
TUNE ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What the compiled kernels are made of, and where: setup.py's folder, so that what did not change is not compiled again.
SOURCES := CMakeLists.txt $(wildcard csrc/common/* csrc/cpu/* csrc/cuda/*)
NATIVE = build/native-$(shell $(BIN)/python -c 'import sys, sysconfig; \
  print(sys.implementation.cache_tag, sysconfig.get_platform(), sep="-")')
# Tests that `make sanitize` runs on the native backend.
SANITIZED := $(wildcard tests/test_*_native.py) $(patsubst %,tests/test_%.py,attention rms_norm layer_norm swiglu gelu \
  rotary linear_cross_entropy inner_sgd)
# With an interpreter of another's, the clone's packages and those of the pack come from the path.
GPU_SITE := build/gpu/site
GPU_PYTHON := $(if $(WITH),PYTHONPATH=$(CURDIR):$(CURDIR)/python:$(CURDIR)/$(GPU_SITE) $(WITH),$(BIN)/python)
GPU_READY := $(if $(WITH),$(GPU_SITE)/.unpacked,$(INSTALLED))
GPU_BENCH = $(GPU_PYTHON) -m benchmarks
GPU_OPTIONS := $(if $(GPU_DRY),--quick --device cpu,--store --device cuda)
GPU_TESTS = $(GPU_PYTHON) -m pytest -q $(if $(GPU_DRY),,-n $(JOBS)) -p no:cacheprovider tests/gpu
OPS := rms_norm layer_norm add_rms_norm add_layer_norm swiglu gelu gelu_tanh rotary
GPU_DONE = @mkdir -p $(@D) && touch $@
# The build is not put off: the others run on it.
GPU_BEGUN = $(filter-out build,$(foreach stage,$(STAGES),$(if $(wildcard build/gpu/$(stage).begun),$(stage))))
GPU_ORDER = $(filter-out $(GPU_BEGUN),$(STAGES)) $(GPU_BEGUN)
# Torch is not among them, nor what comes with it.
PACKED := 'setuptools>=77' pybind11 cmake ninja rich typer safetensors pytest pytest-xdist hypothesis nvtx
# Kernels for CUDA take minutes to compile, and only a GPU runs them.
export GRADMEM_CUDA ?= $(if $(shell command -v nvidia-smi),auto,off)
# What the compile report has compiled, where there is nvcc, and the headers that this takes.
CUDA_BUILD := build/cuda
CUTLASS = $(shell $(BIN)/python -c 'from importlib.util import find_spec; \
  print(find_spec("cutlass_library").submodule_search_locations[0])')/source/include
# The oldest Triton that pyproject.toml allows, installed beside the environment's own.
OLD_TRITON := $(VENV)/triton-3.6.0

.DELETE_ON_ERROR:
.PHONY: help demo test test-native test-hopper test-wheel sanitize lint docs bench compile-report compile-report-cuda \
  gpu gpu-again gpu-pack tune clean

help: ## this list
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 24
	@echo '  variables: PYTHON=$(PYTHON)  TORCH_INDEX_URL=$(TORCH_INDEX_URL)  SUITE="$(SUITE)"  REPORT=$(REPORT)'

demo: $(INSTALLED) ## train a small GradMem, write a context into a memory, answer from the memory alone (runs/demo)
	$(BIN)/gradmem demo

test: test-native ## all tests, those of Triton kernels in its interpreter
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then set -x; \
	  TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/interpreter; \
	else echo 'Triton has no wheel for this platform: its kernels are not tested'; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

test-native: $(INSTALLED) ## the tests in C++
	@if test -f $(NATIVE)/build.ninja; then set -ex; $(BIN)/cmake --build $(NATIVE) --target cpu_tests; \
	  $(BIN)/ctest --test-dir $(NATIVE) --output-on-failure; \
	else echo 'nothing was compiled here: no tests in C++ (gradmem doctor says why)'; fi

test-hopper: $(VENV)/.cutlass ## the attention kernels for Hopper by their sources, compiled for a CPU; needs CUDA's headers
	@if command -v nvcc > /dev/null; then set -ex; $(BIN)/cmake -DCUTLASS_INCLUDE=$(CUTLASS) $(NATIVE); \
	  $(BIN)/cmake --build $(NATIVE) --target hopper_on_cpu; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/test_attention_hopper.py; \
	else echo 'there is no nvcc in PATH: attention for Hopper is not tested'; fi

test-wheel: $(INSTALLED) ## builds a wheel from a source distribution, in isolation, and runs it elsewhere
	GRADMEM_TEST_WHEEL=1 $(BIN)/python -m pytest -q tests/test_wheel.py

# -O1 compiles sooner, and shows the lines that are at fault.
sanitize: $(INSTALLED) ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, by GCC
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=$(CXX) \
	  -DCMAKE_CXX_FLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer' \
	  -DGRADMEM_OPTIMISATION=-O1 -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize --target _cpu cpu_tests
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure
	GRADMEM_SANITIZED=$$(ls $(CURDIR)/build/sanitize/_cpu.*.so) PYTHONPATH=tests OMP_NUM_THREADS=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -p sanitized -n 2 -q -k native $(SANITIZED)

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(INSTALLED) ## the reference of both packages from their docstrings, as HTML, into docs/api
	$(BIN)/pip install -q -c constraints.txt 'pdoc>=15'
	$(BIN)/python -m pdoc -d google -o docs/api gradmem gradmem.hf gradmem.convert gradmem.tasks gradmem_kernels

bench: $(INSTALLED) ## a benchmark suite: make bench SUITE="memory --quick"
	$(BIN)/python -m benchmarks $(SUITE)

compile-report: $(INSTALLED) $(OLD_TRITON)/.installed ## what kernels for GPUs compile to, against the tables
	@# all, whatever the first finds; those of Triton, of a process each, side by side
	$(MAKE) --no-print-directory compile-report-cuda REPORT=$(filter --update,$(REPORT)); cuda=$$?; \
	mkdir -p build; \
	PYTHONPATH=$(CURDIR)/$(OLD_TRITON) $(BIN)/python -m benchmarks compile-report $(REPORT) > build/old-triton.txt 2>&1 & \
	$(BIN)/python -m benchmarks compile-report $(REPORT); new=$$?; \
	wait $$!; old=$$?; cat build/old-triton.txt; exit $$((cuda ? cuda : old ? old : new))

compile-report-cuda: $(VENV)/.cutlass ## of these, the CUDA C++ kernels alone
	@if command -v nvcc > /dev/null; then set -ex; \
	  $(BIN)/cmake -S . -B $(CUDA_BUILD) -G Ninja -DGRADMEM_CUDA=ON -DCMAKE_CUDA_COMPILER=$$(command -v nvcc) \
	    '-DCMAKE_CUDA_ARCHITECTURES=80;90a' -DCUTLASS_INCLUDE=$(CUTLASS) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir); \
	  $(BIN)/cmake --build $(CUDA_BUILD) --target _cuda; \
	  $(BIN)/python -m benchmarks compile-report --cuda --module $(CUDA_BUILD)/_cuda.*.so \
	    --toolkit $$(nvcc --version | sed -n 's/.*, V\([0-9.]*\).*/\1/p') $(REPORT); \
	else echo 'there is no nvcc in PATH: CUDA C++ kernels are not compiled'; fi

gpu: $(GPU_READY) ## on a GPU: build, tests, sanitizer, benchmarks, most telling first; goes on where it stopped
	@$(if $(GPU_DRY),true,$(GPU_PYTHON) -c 'import sys, torch; \
	  sys.exit(None if torch.cuda.is_available() else "make gpu: no CUDA device here; GPU_DRY=1 goes through it without")')
	@start=$$(date +%s); undone=; \
	mkdir -p build/gpu; for stage in $(GPU_ORDER); do \
	  left=$$(($(GPU_MINUTES) * 60 - $$(date +%s) + start)); \
	  if test -e build/gpu/$$stage; then echo "gpu: $$stage is done"; \
	  elif test $$left -lt 20; then undone="$$undone $$stage"; \
	  else echo "gpu: $$stage, $$left s left"; touch build/gpu/$$stage.begun; \
	    timeout -k 10 $$left $(MAKE) --no-print-directory build/gpu/$$stage || undone="$$undone $$stage"; fi; \
	done; \
	test -z "$$undone" || { echo "gpu: not done:$$undone; the same command tries again"; exit 1; }

gpu-again: ## forget which stages of make gpu are done
	rm -f $(STAGES:%=build/gpu/%) $(STAGES:%=build/gpu/%.begun) $(if $(filter ops,$(STAGES)),build/gpu/ops-*)

gpu-pack: $(INSTALLED) ## what a machine with a GPU and no network lacks, into PACK, for its Python
	@mkdir -p $(PACK)
	$(BIN)/pip download -d $(PACK) --python-version $(PACK_PYTHON) --only-binary=:all: -c constraints.txt $(PACKED)
	$(BIN)/pip download -d $(PACK) --python-version $(PACK_PYTHON) --only-binary=:all: -c constraints.txt --no-deps \
	  nvidia-cutlass
	@echo 'copy $(PACK) along with the clone; there: make gpu WITH=python3'

tune: $(GPU_READY) ## on a GPU: look for faster configurations of the attention kernels
	$(GPU_PYTHON) -m benchmarks tune $(TUNE)

$(GPU_SITE)/.unpacked:
	@mkdir -p $(@D)
	@if test -d $(PACK); then set -ex; \
	  $(WITH) -m pip install -q --no-index --find-links $(PACK) --target $(@D) $(PACKED); \
	  $(WITH) -m pip install -q --no-index --find-links $(PACK) --target $(@D) --no-deps nvidia-cutlass; touch $@; \
	else echo 'no $(PACK): the interpreter itself has to have what setup.py and the tests need'; fi

# What `pip install --no-build-isolation -e .` compiles, into the clone, for this GPU alone.
build/gpu/build: | $(GPU_READY)
	$(if $(GPU_DRY),,GRADMEM_CUDA=on GRADMEM_CUDA_ARCHS=$$($(GPU_PYTHON) -c 'import torch; \
	  major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + "a" * (major == 9))')) \
	  $(GPU_PYTHON) setup.py build_ext --inplace
	$(GPU_PYTHON) -m gradmem doctor
	$(GPU_DONE)

build/gpu/configs: | $(GPU_READY)
	$(GPU_TESTS) -k 'every_config or every_kernel or graph_capture'
	$(GPU_DONE)

build/gpu/tests: | $(GPU_READY)
	$(GPU_TESTS) -k 'not every_config and not every_kernel and not graph_capture'
	$(GPU_DONE)

# Few and small: under memcheck a kernel takes a hundred times as long. Without PyTorch's cache each tensor has bounds. The
# tool is the toolkit's, as nvcc is.
build/gpu/sanitize: | $(GPU_READY)
	PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; export PATH; \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(if $(GPU_DRY),,compute-sanitizer --tool memcheck --target-processes all \
	  --error-exitcode 1) env $(GPU_PYTHON) -m pytest -q -p no:cacheprovider \
	  tests/gpu/test_native_rows_gpu.py tests/gpu/test_attention_gpu.py tests/gpu/test_attention_hopper_gpu.py \
	  -k 'test_empty or test_lengths and (-17- or -1-) or test_some_tangents'
	$(GPU_DONE)

build/gpu/headline build/gpu/memory build/gpu/gqa build/gpu/sweep: | $(GPU_READY)
	$(GPU_BENCH) attention --only $(@F) $(GPU_OPTIONS)
	$(if $(filter headline,$(@F)),$(GPU_BENCH) attention --only long $(GPU_OPTIONS))
	$(GPU_DONE)

build/gpu/price build/gpu/paper build/gpu/long build/gpu/flat: | $(GPU_READY)
	$(GPU_BENCH) meta-step --only $(@F) $(GPU_OPTIONS)
	$(GPU_DONE)

build/gpu/inner build/gpu/train build/gpu/cross-entropy: | $(GPU_READY)
	$(GPU_BENCH) $(or $($(@F)_suite),$(@F)) $(GPU_OPTIONS)
	$(GPU_DONE)
inner_suite := inner-step
train_suite := end-to-end

# One by one: what PyTorch compiles takes longer than there may be time at once.
build/gpu/ops: $(OPS:%=build/gpu/ops-%)
	$(GPU_DONE)

$(OPS:%=build/gpu/ops-%): | $(GPU_READY)
	$(GPU_BENCH) ops --only $(@F:ops-%=%) $(GPU_OPTIONS)
	$(GPU_DONE)

clean: ## remove the environment, caches and build products; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f gradmem_kernels/native/_*.so gradmem_kernels/native/build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'Python 3.10 or newer is needed; $(PYTHON) is not. Name another: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo '$(PYTHON) cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3-venv)'; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# Another torch comes first, so that the second line finds it installed; alone, because such an index holds other
# versions of its dependencies than constraints.txt.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES) | $(BIN)/python
	$(if $(TORCH_INDEX_URL),$(BIN)/pip install --no-deps -c constraints.txt --index-url $(TORCH_INDEX_URL) torch)
	$(BIN)/pip install -c constraints.txt 'setuptools>=77' cmake ninja pybind11
	@# of what kernels for CUDA need only headers are used: none of its dependencies
	needed=$$($(BIN)/python -c 'import setuptools.build_meta as build; print(*build.get_requires_for_build_wheel())' \
	  | tail -n 1); test -z "$$needed" || $(BIN)/pip install -c constraints.txt --no-deps "$$needed"
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.cutlass: | $(INSTALLED)
	$(BIN)/pip install -c constraints.txt --no-deps nvidia-cutlass
	@touch $@

$(OLD_TRITON)/.installed: | $(INSTALLED)
	$(BIN)/pip install --no-deps --target $(@D) triton==$(patsubst triton-%,%,$(notdir $(@D)))
	@touch $@

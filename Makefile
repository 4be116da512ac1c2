# One word each: demo, test, test-network, gpu, lint, bench, sanitize, clean.
PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
OPS ?=
PARTS ?= test,bench
JOBS := $(shell nproc 2>/dev/null || echo 2)
export OPENBLAS_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
# packages are installed without bytecode: who imports first writes it, whatever the environment says
export PYTHONDONTWRITEBYTECODE :=
export HF_DATASETS_DISABLE_PROGRESS_BARS := 1
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
# Compiling CUDA takes a minute, and a demo without a GPU has no use for it. Once built whole, it stays whole.
GPU := $(wildcard /dev/nvidiactl)$(shell nvidia-smi -L 2>/dev/null | grep -m1 '^GPU')
DEMO_BUILD := $(if $(GPU)$(wildcard .stamps/build),.stamps/build,.stamps/build-cpu)

.PHONY: demo test test-network lint gpu bench sanitize ctest build clean

demo: $(DEMO_BUILD)
	$(BIN)/deepfusion run examples/demo.toml $(if $(DATA),--set data.source=files --set data.path=$(DATA) --set run.output=runs/demo-files)

# A file of tests to a process, in order: the driver's long ones begin. Waiting threads sleep, since processes share the cores.
test: .stamps/test .stamps/build lint ctest
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations=15

# Real servers and devices on loopback, killed, starved and lied to: minutes of waiting for clocks.
test-network: .stamps/test .stamps/build
	$(BIN)/python -m pytest tests/network -m "" --durations=15

lint: .stamps/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Debug build with asserts of the parts that need no torch.
ctest: .stamps/test
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/ctest -GNinja -DCMAKE_BUILD_TYPE=Debug -DDF_WITH_CUDA=OFF \
	  -DDF_BUILD_TESTS=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python > build/ctest.log || { cat build/ctest.log; exit 1; }
	$(BIN)/cmake --build build/ctest --target cpp_tests
	$(BIN)/ctest --test-dir build/ctest --output-on-failure

# AddressSanitizer and UndefinedBehaviorSanitizer over the CPU kernels, in a build folder of their own.
sanitize: .stamps/test
	PY=$(CURDIR)/$(BIN)/python sh csrc/tests/sanitize.sh

# For a machine with an NVIDIA GPU: uses the interpreter and packages that are there, downloads nothing.
gpu:
	PY="$(PY)" OPS="$(OPS)" PARTS="$(PARTS)" sh benchmarks/gpu.sh

bench: .stamps/test .stamps/build
	$(BIN)/python benchmarks/run.py $(foreach op,$(OPS),--op $(op))

build: .stamps/build

.stamps/venv:
	$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "DeepFusion needs Python >= 3.11, this is " + sys.version)'
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	mkdir -p .stamps build
	touch $@

# Python compiles what is imported: 493 of 14,199 files.
.stamps/demo: .stamps/venv requirements/build.txt requirements/demo.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements/demo.txt
	touch $@

.stamps/test: .stamps/demo requirements/test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/test.txt
	touch $@

.stamps/build: CUDA := AUTO
# the demo's own build: for this processor and no other, in half the time
.stamps/build-cpu: CUDA := OFF
.stamps/build-cpu: LEVELS := native
.stamps/build .stamps/build-cpu: .stamps/demo $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" MAX_JOBS=$(JOBS) CMAKE_ARGS="-DDF_WITH_CUDA=$(CUDA) -DDF_LEVELS=$(LEVELS) $(CMAKE_ARGS)" \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build .stamps deepfusion_kernels/*.so *.egg-info

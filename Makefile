# make train      set everything up in .venv and train SCNet on the embedded data set
# make test       set everything up in .venv and run the tests
# make bench      set everything up in .venv, time every operator beside its peers, and print the tables (13 minutes)
# make record NAME=amd-epyc-2-cores   on an idle machine: the same, and writes every published number and picture anew
# make emulate-cuda   run the CUDA kernels on the CPU, emulated, against the references; needs no GPU and no nvcc
# make sanitize   build the CPU kernels with AddressSanitizer, UBSan, ThreadSanitizer and 16-bit indices, and test them
# make fuzz       a million random problems for each operator, as many damaged files for each reader, 10^8 run lengths
#                 under sanitizers, and every kind of bad input also under torch.compile
# make audit      known holes in the packages that were installed (pip-audit; it asks a service on the network), and holes
#                 in what GitHub is asked to run (zizmor)
# make soak       kill 10,000 training runs and 1,000 jobs of two processes, and compare what they end with; kill 2,000
#                 processes that read images; flip 100,000 bits of checkpoints; cut the power in 20,000 ways; save 2,000
#                 times and look for leaks; 200 hung processes
# make lint       ruff and clang-format, as CI runs them
# make data       write the embedded data set as a COCO folder
# make gpu-check  on a machine with an NVIDIA GPU and the CUDA toolkit: build, test on the GPU, print one page
# make clean      remove .venv and everything built
#
# PYTHON, VENV and TORCH can be given: make test PYTHON=python3.12 TORCH=torch==2.11.0

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

run := $(VENV)/bin/python
pip := $(VENV)/bin/pip --disable-pip-version-check
sources := setup.py pyproject.toml $(shell find csrc -type f)
cpu_index := https://download.pytorch.org/whl/cpu

# Where there is no GPU the CUDA kernels are left out: they take minutes to compile, and nothing could run them.
export CASCADEOPS_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)

.PHONY: train test bench record emulate-cuda sanitize fuzz audit soak lint data gpu-check clean

train: $(VENV)/.detect
	$(run) -m models.train --arch scnet $(ARGS)

# There are more threads than cores: those that wait sleep, instead of spinning on the time of the others. Files in the
# order of their names: those of few tests, which would come last, are the longest.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/.test
	$(run) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

# The programs ask PyTorch for large pages, so everything here is timed with them.
bench record: export THP_MEM_ALLOC_ENABLE ?= 1
bench: $(VENV)/.bench
	@mkdir -p build
	$(run) -m pytest benchmarks/ --benchmark-only --benchmark-quiet --benchmark-json=build/benchmarks.json $(ARGS)
	$(run) -m benchmarks.report build/benchmarks.json --output build/report

record: $(VENV)/.bench
	scripts/record_benchmarks.sh $(run) $(NAME)

# Of each operator with a CUDA kernel its own tests; of a test with many cases some of them. (test_faults.py is about
# training; the tests of csrc/cuda/faults.cu are test_device_faults.py.)
operators_on_cuda := $(filter-out faults,$(patsubst csrc/cuda/%.cu,%,$(wildcard csrc/cuda/*.cu)))
cuda_tests := $(wildcard $(patsubst %,tests/test_%.py,$(operators_on_cuda)))
emulate-cuda: $(VENV)/.test
	$(run) scripts/emulate_cuda.py
	$(run) -m pytest -q tests/test_emulated_cuda.py
	$(run) -m pytest -q --emulate-cuda --cases 6 $(cuda_tests) tests/test_device_faults.py \
	  tests/test_deform_conv2d_regressions.py tests/test_roi_align.py $(ARGS)

sanitize: $(VENV)/.test
	$(run) scripts/sanitize.py address $(ARGS)
	$(run) scripts/sanitize.py thread $(ARGS)
	$(run) scripts/sanitize.py narrow $(ARGS)

fuzz: $(VENV)/.test
	CASCADEOPS_EXAMPLES=$(or $(EXAMPLES),1000000) $(run) -m pytest -q tests/test_properties.py tests/test_data_fuzz.py \
	  tests/test_file_fuzz.py $(ARGS)
	$(run) scripts/fuzz_rle.py --executions $(or $(EXECUTIONS),100000000)
	$(run) tests/test_bad_input.py --compile-all

audit: $(VENV)/.test
	$(call extra,audit)
	$(VENV)/bin/zizmor --offline --persona=pedantic .github/workflows
	$(VENV)/bin/pip-audit --local --skip-editable $(ARGS)

soak: $(VENV)/.test
	CASCADEOPS_FLIPS=100000 CASCADEOPS_POWER_CUTS=12000 CASCADEOPS_WORKER_KILLS=2000 CASCADEOPS_ROUNDS=2000 \
	  $(run) -m pytest -q -s tests/test_checkpoints.py tests/test_power_cuts.py tests/test_workers.py \
	  tests/test_surroundings.py $(ARGS)
	CASCADEOPS_KILLS=$(or $(KILLS),10000) $(run) -m pytest -q -s tests/test_faulty_files.py $(ARGS)
	CASCADEOPS_JOB_KILLS=1000 CASCADEOPS_HANGS=200 $(run) -m pytest -q -s tests/test_killed_jobs.py tests/test_watchdog.py $(ARGS)

data: $(VENV)/.detect
	$(run) -m models.data $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(run) scripts/check_indices.py

gpu-check: $(VENV)/.bench
	scripts/gpu_check.sh $(run)

clean:
	rm -rf $(VENV) build dist *.egg-info cascadeops/*.so

# The environment with torch alone. Without a GPU, PyTorch's own index offers a build of 200 MB; PyPI's, which comes
# with CUDA, takes gigabytes and is the way out where that index cannot be reached.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "CascadeOps needs Python 3.10 or newer, and '$(PYTHON)' is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) into $(VENV)"
	@command -v nvidia-smi >/dev/null || $(pip) install --quiet --no-deps --retries 0 --index-url $(cpu_index) $(TORCH) \
	  || echo "$(cpu_index) cannot be reached: taking the larger build from PyPI"
	$(pip) install --quiet $(TORCH) 'setuptools>=77'
	@touch $@

# The package, linked to this folder, so that only a change of the kernels or of the dependencies installs it again.
$(VENV)/.detect: $(VENV)/.torch $(sources)
	@echo "compiling the kernels and installing the package"
	$(pip) install --quiet --no-build-isolation --editable '.[detect]'
	@touch $@

# The requirements of one extra, which the installed package knows.
extra = $(run) -c 'import importlib.metadata as m; \
  print(*(r.split(";")[0] for r in m.requires("cascadeops") if "extra == \"$(1)\"" in r), sep="\n")' \
  | xargs $(pip) install --quiet

$(VENV)/.test: $(VENV)/.detect
	$(call extra,test)
	@touch $@

# torchvision is the peer that most operators are timed against: the build for this torch, if there is one.
$(VENV)/.bench: $(VENV)/.test
	@{ ! command -v nvidia-smi >/dev/null && $(pip) install --quiet --retries 0 --index-url $(cpu_index) torchvision $(TORCH); } \
	  || $(pip) install --quiet torchvision $(TORCH) || true
	@$(run) -c 'import torchvision' 2>/dev/null || { $(pip) uninstall --quiet --yes torchvision; \
	  echo "no torchvision that works with $(TORCH): the benchmarks run without it"; }
	@touch $@

$(VENV)/.lint: $(VENV)/.detect
	$(call extra,lint)
	@touch $@

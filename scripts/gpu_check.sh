#!/usr/bin/env bash
# Everything that only a GPU can show, on one page: scripts/gpu_check.sh [PYTHON]     (make gpu-check calls it)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}

command -v nvidia-smi >/dev/null || { echo "gpu-check: there is no nvidia-smi, so no NVIDIA GPU to check" >&2; exit 1; }
"$python" - <<'END'
import sys, torch
if torch.version.cuda is None:
    sys.exit(f"gpu-check: torch {torch.__version__} is built without CUDA: remove .venv, then make gpu-check TORCH='torch==2.13.0'")
if not torch.cuda.is_available():
    sys.exit("gpu-check: torch sees no GPU; does nvidia-smi show one?")
import cascadeops
if cascadeops._binary.cuda.path is None:
    sys.exit(f"gpu-check: no CUDA kernels: {cascadeops._binary.cuda.reason}. Install the CUDA toolkit (nvcc), then: touch setup.py; make gpu-check")
END

status=0
step() { echo; echo "== $1"; shift; "$@" || { echo "   FAILED (exit status $?)"; status=1; }; }

echo "== commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv
step "doctor: every operator against its reference, on CPU and GPU" "$python" -m cascadeops
step "tests on the GPU: CUDA equals CPU equals reference" "$python" -m pytest -q -k cuda
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
  # The self-tests: the tests themselves would take hours under the sanitizer.
  step "compute-sanitizer memcheck" "$sanitizer" --tool memcheck --error-exitcode 1 --print-limit 10 "$python" -m cascadeops
  step "compute-sanitizer racecheck" "$sanitizer" --tool racecheck --error-exitcode 1 --print-limit 10 "$python" -m cascadeops
else
  echo; echo "== compute-sanitizer: not found, so memcheck and racecheck did not run"
fi

echo
if [ $status -eq 0 ]; then echo "gpu-check: passed"; else echo "gpu-check: FAILED"; fi
exit $status

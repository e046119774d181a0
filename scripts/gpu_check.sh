#!/usr/bin/env bash
# Everything that only a GPU can show, on one page: scripts/gpu_check.sh [PYTHON]     (make gpu-check calls it)
#
# The long outputs go to build/gpu_check/; benchmarks.json there is what benchmarks/results/ keeps.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
logs=build/gpu_check

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

mkdir -p "$logs"
status=0
page=()
# step NAME COMMAND...: the last line of its output is its line of the page.
step() {
  local name=$1 log="$logs/${1// /_}.log" verdict=passed
  shift
  echo "== $name"
  "$@" >"$log" 2>&1 || { verdict="FAILED (exit status $?), see $log"; status=1; tail -n 30 "$log"; }
  page+=("$(printf '%-24s %s  %s' "$name" "$verdict" "$(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-100)")")
}

step "doctor" "$python" -m cascadeops
step "tests" "$python" -m pytest -q -k cuda

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
for tool in memcheck racecheck initcheck synccheck; do
  if [ -n "$sanitizer" ]; then
    # The self-tests: the tests themselves would take hours under the sanitizer.
    step "$tool" "$sanitizer" --tool $tool --error-exitcode 1 --print-limit 10 "$python" -m cascadeops
  else
    page+=("$(printf '%-24s not run: there is no compute-sanitizer' "$tool")")
  fi
done
step "benchmarks" "$python" -m pytest -q benchmarks --benchmark-only --benchmark-quiet -k cuda \
  --benchmark-json="$logs/benchmarks.json"

echo
echo "gpu-check of commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader
printf '%s\n' "${page[@]}"
echo
[ -s "$logs/benchmarks.json" ] && "$python" -m benchmarks.report "$logs/benchmarks.json"
if [ $status -eq 0 ]; then echo "gpu-check: passed"; else echo "gpu-check: FAILED"; fi
exit $status

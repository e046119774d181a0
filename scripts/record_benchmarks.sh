#!/usr/bin/env bash
# Measures and writes every published number and picture: scripts/record_benchmarks.sh PYTHON NAME
#
# NAME is the machine's, as in benchmarks/results: amd-epyc-2-cores. The machine should be idle: a quarter of an hour on
# two cores. What became slower since the last record is printed; the changed files are left to be looked at and
# committed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?PYTHON is missing} name=${2:?NAME of the machine is missing: make record NAME=amd-epyc-2-cores}
if [ -n "$(git status --porcelain)" ]; then
  echo "record: commit first, so that the results name what was measured" >&2
  exit 1
fi

mkdir -p build
"$python" -m pytest benchmarks --benchmark-only --benchmark-quiet --benchmark-json=build/benchmarks.json
last=$(ls benchmarks/results/"${name}"_*.json 2>/dev/null | tail -n 1)
if [ -n "$last" ]; then
  echo "== against $last"
  "$python" -m benchmarks.compare "$last" build/benchmarks.json || true
fi
"$python" -m benchmarks.profile_detector scnet_r50_fpn_1x_coco --picture docs/profile_scnet_r50.svg --page docs/performance.md
"$python" -m benchmarks.memory_prediction --all --output benchmarks/predicted_memory.json
cp build/benchmarks.json "benchmarks/results/${name}_$(date +%Y%m).json"
"$python" -m benchmarks.report benchmarks/results/*.json --rewrite README.md benchmarks/results/README.md docs/performance.md

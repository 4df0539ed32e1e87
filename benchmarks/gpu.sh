#!/usr/bin/env bash
# All checks and times of the CUDA kernels, on a machine with an NVIDIA GPU.
#
#   benchmarks/gpu.sh build    here, without a GPU: kernels, models and the runtime, into build-gpu (some 45 MiB)
#   benchmarks/gpu.sh run      there, with a copy of this folder: checks, then times, in under ten minutes; needs Python 3.12 with
#                              numpy and torch, no network and no CUDA toolkit. Exit status 2 where there is no GPU.
#   benchmarks/gpu.sh          builds if need be, then runs
#
# OUT=DIR (default: benchmarks/results) is where results are written; BUDGET=SECONDS (default: 540) when times end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=build-gpu
out=${OUT:-benchmarks/results}
here=.venv/bin/python

build() {
    [ -x "$here" ] || { echo "no environment; run 'make setup' first" >&2; exit 1; }
    "$here" -m benchmarks.gpu.build "$folder"
}

run() {
    [ -d "$folder" ] || { echo "no $folder; run 'benchmarks/gpu.sh build' on a host with the environment first" >&2; exit 1; }
    mkdir -p "$out"
    # The environment of the building host must not be found there, nor its Python.
    PYTHONPATH="$folder/site:$PWD" PYTHONUNBUFFERED=1 "${PYTHON:-python3}" -m benchmarks.gpu.run "$folder" "$out" --budget "${BUDGET:-540}"
    if [ -f "$folder/candidates/measure.py" ]; then
        "${PYTHON:-python3}" "$folder/candidates/measure.py" && cp "$folder/candidates/results.jsonl" "$out/candidates.jsonl"
    fi
}

case "${1:-}" in
    build) build ;;
    run) run ;;
    "") [ -d "$folder" ] || build; run ;;
    *) echo "usage: benchmarks/gpu.sh [build | run]" >&2; exit 1 ;;
esac

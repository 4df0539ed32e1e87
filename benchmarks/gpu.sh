#!/usr/bin/env bash
# All checks and times of the CUDA kernels, on a machine with an NVIDIA GPU.
#
#   benchmarks/gpu.sh build    here, without a GPU: kernels, models and the runtime, in one file of build-gpu
#   benchmarks/gpu.sh run      there, with a copy of this folder: checks, then times, in under ten minutes; needs Python 3.12 with
#                              numpy and torch, no network and no CUDA toolkit. Exit status 2 where there is no GPU.
#   benchmarks/gpu.sh          builds if need be, then runs
#
# Options of run: --out DIR (benchmarks/results) is where results are written, --budget SECONDS (540) when times end.
# PYTHON names another interpreter than python3. Tuning candidates in build-gpu/candidates are measured on the same visit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=build-gpu
candidates=$folder/candidates
python=${PYTHON:-python3}
out=benchmarks/results
budget=540
here=.venv/bin/python

fail() {
    echo "gpu.sh: $1" >&2
    exit 1
}

build() {
    [ -x "$here" ] || fail "no environment; run 'make setup' first"
    mkdir -p "$folder"
    "$here" -m benchmarks.gpu.build "$folder"
}

run() {
    [ -f "$folder/kit.tar.xz" ] || fail "no $folder/kit.tar.xz; run 'benchmarks/gpu.sh build' where tvm-ternary is installed"
    (cd "$folder" && sha256sum --quiet --check kit.sha256) || fail "$folder/kit.tar.xz is not what was built; copy it again"
    local kit seconds=$budget
    kit=$(mktemp -d)
    # shellcheck disable=SC2064  # The folder is known now.
    trap "rm -rf '$kit'" EXIT
    "$python" -m tarfile -e "$folder/kit.tar.xz" "$kit" || fail "'$python' cannot unpack; it needs Python 3.12 with lzma"
    if [ -f "$candidates/measure.py" ]; then seconds=$((budget / 2)); fi
    # The environment of the building host must not be found there, nor its Python.
    PYTHONPATH="$kit/site:$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
        "$python" -m benchmarks.gpu.run "$kit" "$out" --budget "$seconds"
    if [ -f "$candidates/measure.py" ]; then measure "$kit"; fi
}

# What tuning has exported, in the time that is left. It goes on from what was measured on an earlier visit.
measure() {
    local left=$((budget - SECONDS)) status=0
    # tvm_ffi there is for the Python that exported them.
    rm -rf "$candidates"/python/tvm_ffi "$candidates"/python/apache_tvm_ffi-*
    PYTHONPATH="$1/site" timeout "$((left > 1 ? left : 1))" "$python" "$candidates/measure.py" || status=$?
    [ "$status" -ne 124 ] || echo "candidates: stopped at the end of the budget; the next run goes on"
    [ ! -f "$candidates/results.jsonl" ] || cp "$candidates/results.jsonl" "$out/candidates.jsonl"
    [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || fail "measuring the candidates ended with status $status"
}

usage() {
    fail "usage: benchmarks/gpu.sh [build | run] [--out DIR] [--budget SECONDS]"
}

word=all
case "${1:-}" in
    build | run) word=$1; shift ;;
    "" | --*) ;;
    *) usage ;;
esac
while [ $# -gt 0 ]; do
    if [ $# -lt 2 ]; then usage; fi
    case "$1" in
        --out) out=$2 ;;
        --budget) budget=$2 ;;
        *) usage ;;
    esac
    shift 2
done
[[ "$budget" =~ ^[1-9][0-9]*$ ]] || fail "--budget is '$budget'; expected whole seconds"
if [ "$word" = build ] || { [ "$word" = all ] && [ ! -f "$folder/kit.tar.xz" ]; }; then build; fi
if [ "$word" != build ]; then run; fi

#!/usr/bin/env bash
# Compare differently tuned builds of the CUDA kernels (csrc/cuda/tuning.h) on a GPU.
#   benchmarks/tune_kernels.sh
# Builds the core with one setting after the other, times a step of AdamClaraLocal with each, into build/tune/NAME, and at
# last builds the core as usual again. Exit codes: 0 all were measured, 1 a build or a measurement failed.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=.venv/bin/python
[ -x "$python" ] || python=python3
# A name, and what it sets of CLARA_CUDA_...
settings=(
    "default"
    "chunk2048 CHUNK=2048"
    "chunk8192 CHUNK=8192"
    "chunk16384 CHUNK=16384"
    "threads128 THREADS=128"
    "threads512 THREADS=512"
    "update1280 UPDATE_THREADS_PER_SM=1280"
    "path1024 PATH_CHUNK=1024"
    "path4096 PATH_CHUNK=4096"
)

# nvcc adds NVCC_APPEND_FLAGS to its command line. ninja does not know of them: it compiles anew because the header has
# a new date.
build() {
    touch csrc/cuda/tuning.h
    NVCC_APPEND_FLAGS="$*" CLARA_BUILD=cuda "$python" setup.py --quiet build_ext --inplace
}

measure() {
    "$python" benchmarks/step_time.py --device cuda --seconds 2 --models gpt2-xl one-350m --optimizers local \
        --out "build/tune/$1"
}

failed=0
trap 'build || exit 1' EXIT # also where this is interrupted, so that nobody goes on with a tuned core
for setting in "${settings[@]}"; do
    echo "== $setting"
    read -r name values <<<"$setting"
    flags=()
    for value in $values; do
        flags+=("-DCLARA_CUDA_$value")
    done
    { build "${flags[@]}" && measure "$name"; } || failed=1
done
exit $failed

#!/usr/bin/env bash
# Compare differently tuned builds of the CUDA kernels (csrc/cuda/tuning.h) on a GPU, without Python.
#   benchmarks/tune_kernels.sh [--build-only] [--arch 90] [MODEL ...]
# Models: gpt2-small gpt2-xl one-350m small-1000x64; the first three by default. All builds are compiled at the same
# time, into build/tune, and then run one after the other; a line per build, model and type of parameters.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A name, and what it sets of CLARA_CUDA_...
builds=(
    "default"
    "vectors2 UPDATE_VECTORS=2 UPDATE_THREADS_PER_SM=768"
    "chunk4096 CHUNK=4096"
    "chunk16384 CHUNK=16384"
    "chunk32768 CHUNK=32768"
    "threads128 THREADS=128"
    "threads512 THREADS=512"
    "update1280 UPDATE_THREADS_PER_SM=1280"
    "path2048 PATH_CHUNK=2048"
    "path8192 PATH_CHUNK=8192"
    "measure2 MEASURE_VECTORS=2 MEASURE_THREADS_PER_SM=768"
    "vectors2-threads128 UPDATE_VECTORS=2 UPDATE_THREADS_PER_SM=768 THREADS=128"
)
arch=
build_only=
models=()
while [ $# -gt 0 ]; do
    case $1 in
        --build-only) build_only=1; shift ;;
        --arch) arch=${2:?--arch takes a number}; shift 2 ;;
        *) models+=("$1"); shift ;;
    esac
done
[ ${#models[@]} -gt 0 ] || models=(gpt2-small gpt2-xl one-350m)
[ -n "$arch" ] || arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)

mkdir -p build/tune
build() {
    read -r name settings <<<"$1"
    [ ! -x "build/tune/$name" ] || return 0
    # shellcheck disable=SC2086  # words
    nvcc -std=c++17 -O3 -DNDEBUG -gencode="arch=compute_$2,code=sm_$2" $(printf -- '-DCLARA_CUDA_%s ' $settings) \
        benchmarks/time_kernels.cu csrc/cuda/*.cu -o "build/tune/$name" 2>"build/tune/$name.log" ||
        { echo "$name does not compile: build/tune/$name.log"; rm -f "build/tune/$name"; }
}
export -f build
printf '%s\n' "${builds[@]}" | xargs -P "$(nproc)" -d '\n' -I{} bash -c "build '{}' $arch"
[ -z "$build_only" ] || exit 0
for line in "${builds[@]}"; do
    name=${line%% *}
    [ ! -x "build/tune/$name" ] || "build/tune/$name" "$name" "${models[@]}"
done

#!/usr/bin/env bash
# Record steady optimizer steps with Nsight Systems and print kernel times, launches per step and gaps.
#   benchmarks/profile_nsys.sh [--out DIR] [--dtype DTYPE] [--steps N] MODEL VARIANT
# Leaves DIR/nsys-MODEL-VARIANT-DTYPE.nsys-rep, one CSV per summary, and a JSON with what is printed.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/profile_common.sh"
require_profiler nsys "Nsight Systems"
check_target

base=$out/nsys-$model-$variant-$dtype
nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none \
    --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true --output="$base" \
    "$python" "$here/profile_target.py" "$model" "$variant" --dtype "$dtype" --steps "$steps"

for report in cuda_gpu_kern_sum cuda_gpu_trace cuda_api_sum nvtx_pushpop_sum; do
    nsys stats --report "$report" --format csv --force-export=true --force-overwrite=true --output "$base" \
        "$base.nsys-rep" >/dev/null
done
"$python" "$here/nsight_report.py" nsys "$base" --model "$model" --variant "$variant" --dtype "$dtype"

#!/usr/bin/env bash
# Measure with Nsight Compute how many bytes each kernel moves to and from DRAM, against the bytes that must move.
#   benchmarks/profile_ncu.sh [--out DIR] [--dtype DTYPE] [--steps N] MODEL VARIANT
# Leaves DIR/ncu-MODEL-VARIANT-DTYPE.csv and a JSON with what is printed.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/profile_common.sh"
require_profiler ncu "Nsight Compute"
check_target

base=$out/ncu-$model-$variant-$dtype
# Every kernel is replayed once per group of metrics: one step says as much as ten. Clocks are left as they are in use.
ncu --profile-from-start off --clock-control none --csv --print-units base --log-file "$base.csv" \
    --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum,launch__registers_per_thread \
    "$python" "$here/profile_target.py" "$model" "$variant" --dtype "$dtype" --steps 1
"$python" "$here/nsight_report.py" ncu "$base" --model "$model" --variant "$variant" --dtype "$dtype"

#!/usr/bin/env bash
# Run on a GPU machine everything that needs one: build, tests, sanitizer, benchmarks, profiles.
#   benchmarks/device_pass.sh [--out DIR] [--seconds N] [PART ...]
# Parts: build tests sanitizer step-time graph overhead end-to-end nsys ncu; all of them by default. Each ends within ten
# minutes. Needs no network. DIR (default benchmarks/results) gets the benchmarks' files, device-pass.json with how each
# part ended, and device-pass-PART.log; a table comes last. With --seconds all of it ends in that time, on a machine
# lent for so long; the parts that find none left are not run. Outside a git checkout CLARA_COMMIT tells the commit.
# Exit codes: 0 every part passed or lacked its profiler, 1 a part failed or found no time, 2 bad arguments, 3 no usable
# CUDA device.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
python=$repository/.venv/bin/python
[ -x "$python" ] || python=python3
all_parts=(build tests sanitizer step-time graph overhead end-to-end nsys ncu)
out=$here/results
part_seconds=600
deadline=
parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out takes a folder}; shift 2 ;;
        --seconds)
            if ! [[ ${2:-} =~ ^[1-9][0-9]*$ ]]; then
                echo "--seconds takes a whole number" >&2
                exit 2
            fi
            deadline=$((SECONDS + $2)); shift 2 ;;
        -h | --help) sed -n '2,10s/^# \?//p' "$0"; exit 0 ;;
        *)
            if [[ " ${all_parts[*]} " != *" $1 "* ]]; then
                echo "no part '$1'; there are ${all_parts[*]}" >&2
                exit 2
            fi
            parts+=("$1"); shift ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${all_parts[@]}")

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "PyTorch finds no usable CUDA device" >&2
    exit 3
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$repository" || exit 1
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

missing_profiler=4

# Every access of the kernels is checked, a hundred times slower. initcheck must see PyTorch's writes too.
sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer not found"; return $missing_profiler; }
    for variant in global smoothed-deferred; do
        # Calls that PyTorch makes to find out whether they fail are no concern of memcheck's.
        for tool in "memcheck --report-api-errors no" racecheck synccheck; do
            # shellcheck disable=SC2086  # a tool and its options
            compute-sanitizer --tool $tool --kernel-name kns=clara --error-exitcode 1 \
                "$python" benchmarks/profile_target.py small-148x64 $variant --steps 2 || return
        done
    done
    compute-sanitizer --tool initcheck --error-exitcode 1 \
        "$python" benchmarks/profile_target.py small-148x64 local --steps 2
}

profile() {
    for variant in global local smoothed smoothed-deferred adam-fused; do
        "benchmarks/profile_$1.sh" --out "$out" gpt2-small "$variant" || return
    done
}

run_part() {
    case $1 in
        build)
            # For this device alone: seconds instead of minutes.
            CLARA_BUILD=cuda CLARA_CUDA_ARCHS=$("$python" -c \
                'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
                "$python" setup.py build_ext --inplace && "$python" -m clara_fused ;;
        tests) "$python" -m pytest -q -p no:cacheprovider tests/gpu ;;
        sanitizer) sanitize ;;
        step-time) "$python" benchmarks/step_time.py --device cuda --out "$out" ;;
        graph) "$python" benchmarks/step_time.py --device cuda --graph --models gpt2-small small-1000x64 --out "$out/graph" ;;
        overhead) "$python" benchmarks/cpu_overhead.py --device cuda --out "$out" ;;
        end-to-end) "$python" benchmarks/end_to_end.py --device cuda --out "$out" ;;
        nsys | ncu) profile "$1" ;;
    esac
}
export -f run_part sanitize profile
export python out missing_profiler

records=()
failed=0
for part in "${parts[@]}"; do
    echo "== $part"
    start=$SECONDS
    limit=$part_seconds
    if [ -n "$deadline" ] && [ $((deadline - start - 15)) -lt $limit ]; then
        limit=$((deadline - start - 15))  # to end a part, and for the table
    fi
    if [ $limit -lt 10 ]; then
        records+=("$part|not run: no time left|0")
        failed=1
        continue
    fi
    timeout --kill-after=10 "$limit" bash -c "run_part $part" 2>&1 | tee "$out/device-pass-$part.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) result=passed ;;
        "$missing_profiler") result="not run: no profiler" ;;
        124 | 137) result="ran out of time"; failed=1 ;;
        *) result="failed ($code)"; failed=1 ;;
    esac
    records+=("$part|$result|$((SECONDS - start))")
done

printf '%s\n' "${records[@]}" | PYTHONPATH=$here:$PYTHONPATH "$python" -c '
import json, sys, torch
from harness.environment import describe_environment
rows = [line.rstrip("\n").split("|") for line in sys.stdin]
record = {
    **describe_environment(torch.device("cuda", torch.cuda.current_device())),
    "parts": [{"part": part, "result": result, "seconds": int(seconds)} for part, result, seconds in rows],
}
with open(sys.argv[1], "w") as file:
    json.dump(record, file, indent=2)
    file.write("\n")
gpu = record["machine"]["gpu"]
print("\n%s, driver %s, torch %s" % (gpu["name"], gpu["driver"], record["versions"]["torch"]))
for row in record["parts"]:
    print("%-12s %-24s %4d s" % (row["part"], row["result"], row["seconds"]))
' "$out/device-pass.json"
exit $failed

#!/usr/bin/env bash
# Run on a GPU machine everything that needs one: build, tests, sanitizer, benchmarks, profiles, a training run.
#   benchmarks/device_pass.sh [--out DIR] [--seconds N] [--train-seconds N] [--archive] [PART ...]
# Parts: build tests sanitizer tune step-time overhead ncu train; all but tune by default, reckoned to take less than ten
# minutes on a machine with 16 cores and an H100. Tests and sanitizer run at the same time; whatever is timed has the
# machine to itself. Needs no network. DIR (default benchmarks/results) gets the benchmarks' files, device-pass.json with
# how each part ended, and device-pass-PART.log; tables come last. With --seconds all of it ends in that time: training is cut to what is left, and parts that find nothing left are not run. --archive leaves one
# device-pass.tar.gz in place of logs and profiles. CLARA_COMMIT, where it is set, tells the commit.
# Exit codes: 0 every part passed or lacked its profiler, 1 a part failed or found no time, 2 bad arguments, 3 no usable
# CUDA device.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
python=$repository/.venv/bin/python
[ -x "$python" ] || python=python3
all_parts=(build tests sanitizer tune step-time overhead ncu train)
default_parts=(build tests sanitizer step-time overhead ncu train)
out=$here/results
train_seconds=120
deadline=
archive=
parts=()
number() {
    if ! [[ ${2:-} =~ ^[1-9][0-9]*$ ]]; then
        echo "$1 takes a whole number" >&2
        exit 2
    fi
}
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out takes a folder}; shift 2 ;;
        --seconds) number "$@"; deadline=$((SECONDS + $2)); shift 2 ;;
        --train-seconds) number "$@"; train_seconds=$2; shift 2 ;;
        --archive) archive=1; shift ;;
        -h | --help) sed -n '2,12s/^# \?//p' "$0"; exit 0 ;;
        *)
            if [[ " ${all_parts[*]} " != *" $1 "* ]]; then
                echo "no part '$1'; there are ${all_parts[*]}" >&2
                exit 2
            fi
            parts+=("$1"); shift ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${default_parts[@]}")

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "PyTorch finds no usable CUDA device" >&2
    exit 3
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$repository" || exit 1
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}

missing_profiler=4

# Calls each line of the input as a command, all at the same time; the worst exit status. Each has a log of its own,
# device-pass-NAME-NUMBER.log, which is there also if time runs out.
at_once() {
    local name=$1 worst=0 code command pids=()
    export OMP_NUM_THREADS=2  # else each starts as many threads as there are cores
    while read -r command; do
        bash -c "$command" >"$out/device-pass-$name-${#pids[@]}.log" 2>&1 &
        pids+=($!)
    done
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        code=$?
        [ $code -le $worst ] || worst=$code
        cat "$out/device-pass-$name-$i.log"
    done
    return $worst
}

run_tests() {
    # Where one has failed badly the device is lost for the tests after it.
    local test="$python -m pytest -q -p no:cacheprovider --tb=short --maxfail=8 --timeout=90 tests/gpu -k"
    CLARA_REQUIRE_GPU=1 at_once tests <<TEXT
$test 'Global'
$test 'Local'
$test 'Smoothed'
$test 'not Global and not Local and not Smoothed'
TEXT
}

# Every access of the kernels is checked, a hundred times slower.
sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer not found"; return $missing_profiler; }
    local target="$python benchmarks/profile_target.py mixed" tool="compute-sanitizer --error-exitcode 1 --tool"
    # PyTorch's allocator cuts tensors out of large pieces: one that is overrun would be its neighbour, and memory that is
    # used again would count as initialized.
    local apart="PYTORCH_NO_CUDA_MEMORY_CACHING=1 $tool"
    # Calls that PyTorch makes to find out whether they fail are no concern of memcheck's. initcheck must see PyTorch's
    # writes too. The last line makes sure that memcheck sees a kernel of ours that writes too far.
    local memcheck="$apart memcheck --report-api-errors no --kernel-name kns=clara"
    at_once sanitizer <<TEXT
$memcheck $target global --steps 2
$memcheck $target smoothed --dtype bfloat16 --steps 2
$tool racecheck --kernel-name kns=clara $target global --dtype bfloat16 --steps 2
$tool racecheck --kernel-name kns=clara $target local --steps 2
$tool synccheck --kernel-name kns=clara $target global --steps 2
$apart initcheck $target local --steps 2
$memcheck $target local --overrun 2>&1 | tee /dev/stderr | grep -q 'Invalid __global__ write'
TEXT
}

# Of every given model and optimizer, also where one fails.
profile() {
    local worst=0 code what
    for what in "$@"; do
        # shellcheck disable=SC2086  # several words
        "$python" benchmarks/profile_ncu.py --out "$out" $what
        code=$?
        [ $code -le $worst ] || worst=$code
    done
    return $worst
}

run_part() {
    case $1 in
        build)
            # For this device alone: seconds instead of minutes.
            CLARA_BUILD=cuda CLARA_CUDA_ARCHS=$("$python" -c \
                'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
                "$python" setup.py build_ext --inplace && "$python" -m clara_fused |
                tee /dev/stderr | grep -q '^cuda:0 .*: compiled core$' ;;
        tests) run_tests ;;
        sanitizer) sanitize ;;
        tune) benchmarks/tune_kernels.sh ;;
        step-time)
            "$python" benchmarks/step_time.py --device cuda --seconds 6 --out "$out" \
                --models gpt2-small gpt2-xl one-350m small-1000x64 \
                --optimizers adam-fused adam-foreach apex global local smoothed ;;
        overhead)
            "$python" benchmarks/cpu_overhead.py --device cuda --seconds 2 --out "$out" --tensors 10 100 1000 3000 \
                --optimizers adam-fused adam-foreach global local smoothed ;;
        ncu)
            profile "gpt2-small local" "gpt2-small local --dtype bfloat16" "one-350m local" "gpt2-small adam-fused" ;;
        train)
            [ $((limit - 20)) -ge "$train_seconds" ] || train_seconds=$((limit - 20))
            "$python" benchmarks/train_gpt.py --device cuda --seconds "$train_seconds" --out "$out" ;;
    esac
}

# The most seconds that a part may take by itself.
limit_of() {
    case $1 in
        tests | sanitizer) echo 240 ;;  # one that hangs must not leave the others without time
        *) echo 600 ;;
    esac
}
export -f run_part at_once run_tests sanitize profile
export python out missing_profiler train_seconds

# Runs a part; its log and, for the table, a line in $status/PART.
status=$(mktemp -d)
run_recorded() {
    local part=$1 start=$SECONDS limit code result
    limit=$(limit_of "$part")
    if [ -n "$deadline" ] && [ $((deadline - start - 15)) -lt "$limit" ]; then
        limit=$((deadline - start - 15))  # to end a part, and for the table
    fi
    if [ "$limit" -lt 10 ]; then
        echo "$part|not run: no time left|0" >"$status/$part"
        return
    fi
    limit=$limit timeout --kill-after=10 "$limit" bash -c "run_part $part" 2>&1 | tee "$out/device-pass-$part.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) result=passed ;;
        "$missing_profiler") result="not run: no profiler" ;;
        124 | 137) result="ran out of time" ;;
        *) result="failed ($code)" ;;
    esac
    echo "$part|$result|$((SECONDS - start))" >"$status/$part"
}

for part in "${parts[@]}"; do
    [ ! -e "$status/$part" ] || continue
    if [ "$part" = tests ] && [[ " ${parts[*]} " == *" sanitizer "* ]]; then
        echo "== tests and sanitizer"
        run_recorded sanitizer >/dev/null &
        run_recorded tests
        wait
        cat "$out/device-pass-sanitizer.log" 2>/dev/null
    else
        echo "== $part"
        run_recorded "$part"
    fi
done
mapfile -t records < <(for part in "${parts[@]}"; do cat "$status/$part"; done)
rm -rf "$status"
failed=0
for record in "${records[@]}"; do
    [[ $record == *"|passed|"* || $record == *"|not run: no profiler|"* ]] || failed=1
done

printf '%s\n' "${records[@]}" | "$python" benchmarks/device_report.py "$out"
if [ -n "$archive" ]; then
    (cd "$out" && find . -maxdepth 1 \( -name 'device-pass-*.log' -o -name 'ncu-*' \) -print0 |
        tar czf device-pass.tar.gz --null --remove-files --files-from -)
fi
exit $failed

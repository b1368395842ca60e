# Sourced by profile_nsys.sh and profile_ncu.sh: arguments, and the checks both need.
# Sets: model, variant, dtype, steps, base (path of the outputs without suffix), python.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

explain() {
    cat <<TEXT
usage: $(basename "$0") [--out DIR] [--dtype float32|bfloat16|float16] [--steps N] MODEL VARIANT
for example: $(basename "$0") gpt2-small smoothed
exit codes: 0 recorded, 2 bad arguments, 3 no usable CUDA device, 4 profiler not found
TEXT
}

out=$here/results
dtype=float32
steps=10
names=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out takes a folder}; shift 2 ;;
        --dtype) dtype=${2:?--dtype takes a dtype}; shift 2 ;;
        --steps) steps=${2:?--steps takes a number}; shift 2 ;;
        -h | --help) explain; exit 0 ;;
        -*) explain >&2; exit 2 ;;
        *) names+=("$1"); shift ;;
    esac
done
if [ ${#names[@]} -ne 2 ]; then
    explain >&2
    exit 2
fi
model=${names[0]}
variant=${names[1]}

python=$here/../.venv/bin/python
[ -x "$python" ] || python=python3

require_profiler() {
    if ! command -v "$1" >/dev/null; then
        echo "$1 not found: install NVIDIA $2 and put $1 on PATH" >&2
        exit 4
    fi
}

# Wrong names and missing devices show before a profiler wraps their messages.
check_target() {
    "$python" "$here/profile_target.py" "$model" "$variant" --dtype "$dtype" --steps 1
}

mkdir -p "$out"

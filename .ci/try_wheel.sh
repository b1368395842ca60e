#!/bin/sh
# Builds a wheel from a source distribution and tries it where there is no compiler:
#   sh .ci/try_wheel.sh PYTHON dist/clara_fused-*.tar.gz [CONSTRAINTS]
# A step of each optimizer on the compiled core, in a fresh environment and with an empty PATH. TORCH="torch==2.10.0"
# chooses another PyTorch; PIP_ARGS goes to pip.
set -eu
python=$1
sdist=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
here=$(cd "$(dirname "$0")" && pwd)
constraints=${3:+--constraint $(pwd)/$3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pip="-m pip --disable-pip-version-check install --quiet --no-compile --prefer-binary $constraints ${PIP_ARGS:-}"

echo "== the wheel, built by itself from $sdist (a minute or two)"
"$python" -m venv "$folder/build"
"$folder/build/bin/python" -m pip --disable-pip-version-check wheel --no-deps --wheel-dir "$folder" "$sdist"

echo "== a fresh environment, and PyTorch (a minute once downloaded)"
"$python" -m venv "$folder/try"
# shellcheck disable=SC2086
"$folder/try/bin/python" $pip "${TORCH:-torch}" numpy
# shellcheck disable=SC2086
"$folder/try/bin/python" $pip --no-deps "$folder"/clara_fused-*.whl

echo "== with nothing on the path"
cd "$folder"
PATH="" "$folder/try/bin/python" -m clara_fused
PATH="" "$folder/try/bin/python" "$here/try_step.py"
ls -l "$folder"/clara_fused-*.whl
size=$(wc -c < "$(echo "$folder"/clara_fused-*.whl)")
[ "$size" -lt 10485760 ] || { echo "the wheel is larger than 10 MiB"; exit 1; }

#!/usr/bin/env bash
# Creates the virtual environment and installs the locked packages; idempotent.
#
# torch goes in first: with it in place nothing pulls another build. The locks are installed
# without their dependencies, because vLLM's CPU build asks for torchvision, torchaudio and
# torchcodec, whose ordinary builds want CUDA and break a CPU torch; nothing here needs them.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3.11}
stamp=$venv/.poise-installed

wanted=$(cat requirements/cpu.txt requirements/cuda.txt requirements/setup.sh pyproject.toml setup.py |
	sha256sum | cut -d' ' -f1)-$TORCH-$PWD
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

if [ ! -x "$venv/bin/python" ]; then
	[ -n "$python" ] || { echo "setup: no python3.11 found; set PYTHON=/path/to/python" >&2; exit 2; }
	"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		{ echo "setup: $python is older than 3.11; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	echo "setup: creating $venv" >&2
	"$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }

"$venv/bin/python" -c 'import torch; assert torch.__version__.split("+")[0] == "2.13.0"' 2>/dev/null || {
	echo "setup: installing torch 2.13.0" >&2
	pip torch==2.13.0
}
build=$("$venv/bin/python" -W ignore -c 'import torch; print("cuda" if torch.version.cuda else "cpu")')
case $TORCH in
auto) chosen=$build ;;
cpu | cuda) chosen=$TORCH ;;
*) echo "setup: TORCH=$TORCH: allowed are cpu and cuda" >&2; exit 2 ;;
esac
if [ "$build $chosen" = "cpu cuda" ]; then
	echo "setup: TORCH=cuda: torch came as a cpu build; install a CUDA build of torch 2.13.0 into $venv first" >&2
	exit 2
fi
echo "setup: torch came as a $build build; installing requirements/$chosen.txt" >&2
pip --no-deps -r "requirements/$chosen.txt"
pip --no-deps --no-build-isolation --editable .
printf %s "$wanted" >"$stamp"
echo "setup: done" >&2

#!/bin/sh
# tests/wheel.sh BASE: what users install works. Builds the wheel, installs it into an empty environment with the newest of
# everything but torch, which is the pinned one, and runs it there, away from this folder. BASE is an environment with the tests' packages, for a tiny model.
set -eu
base=$1 work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$base/bin/python" -c 'from tests.tiny import save_tiny; from pathlib import Path; import sys
save_tiny("llama", Path(sys.argv[1]))' "$work/model"
"$base/bin/python" -m venv "$work/venv"
"$work/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$work" .
grep '^torch==' constraints.txt > "$work/constraints.txt"
unset PYTHONPATH
cd "$work"
wheel=$(echo cla_convert-*.whl)
install="venv/bin/pip install --quiet --no-compile --constraint constraints.txt"  # --no-compile: most is never imported

$install "$wheel"  # what loads and serves
venv/bin/cla-convert --help | grep -q uptrain
venv/bin/python -c 'import importlib.util as u; assert not u.find_spec("lm_eval"), "lm-eval belongs to the extra"'

$install "$wheel[convert]"
venv/bin/cla-convert recipes ls | grep -q '^demo '
venv/bin/cla-convert inspect model --json | grep -q '"supported": true'
venv/bin/cla-convert convert model out --sharing cla2 --init mean
venv/bin/cla-convert verify out  # the modelling files are in the wheel
venv/bin/pip check
echo "the wheel installs and runs: $wheel, torch $(venv/bin/python -c 'import torch; print(torch.__version__)')"

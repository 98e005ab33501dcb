#!/bin/sh
# tests/with_packages.sh BASE 'transformers==5.16.*' [ANOTHER...] -- PYTEST ARGUMENTS
# Run tests where the named packages, and what they need, stand before those of the virtual environment BASE.
set -eu
base=$1 packages="" && shift
while [ "$1" != -- ]; do packages="$packages $1" && shift; done
shift
venv=$base-$(echo $packages | tr -c '[:alnum:].\n' - )
[ -d "$venv" ] || "$base/bin/python" -m venv "$venv"
ours=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -f "$ours/zz_base.pth"  # pip must not see BASE, or it would take what is there for installed
free='^(transformers|huggingface_hub|tokenizers|torch)=='
grep -vE "$free" constraints.txt > "$venv/constraints.txt"
"$venv/bin/pip" install --quiet --upgrade --upgrade-strategy only-if-needed --constraint "$venv/constraints.txt" $packages
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$ours/zz_base.pth"
export PYTHONPATH=$PWD  # the package of this folder, as BASE has it
"$venv/bin/python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
exec "$venv/bin/python" -m pytest "$@"

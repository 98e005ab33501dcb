#!/usr/bin/env bash
# Quality recovered per token: calibrated against mean pooling, same data, same loss, one GPU.
# usage: recovery.sh MODEL CORPUS OUT     MODEL: folder, hub id or .gguf; CORPUS: text for data.sources
set -euo pipefail
model=$1 corpus=$2 out=$3 here=$(dirname "$0")
run() {
  cla-convert run smollm2-135m --until uptrain --out "$out/$1" \
    --set "source.model=$model" --set "data.sources=[{path: $corpus}]" "${@:2}"
  python3 "$here/recovery_table.py" "$out/$1"
}
run mean-6.5M --set train.tokens=6.5M --set convert.init=mean
run calibrated-6.5M --set train.tokens=6.5M
run calibrated-26M --set train.tokens=26M

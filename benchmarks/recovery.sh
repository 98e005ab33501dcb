#!/usr/bin/env bash
# Quality recovered per token: calibrated against mean pooling, same data, same loss, one GPU.
# usage: recovery.sh MODEL CORPUS OUT   (MODEL: folder, hub id or .gguf; CORPUS: text for data.sources)
set -euo pipefail
model=$1 corpus=$2 out=$3
common=(--set "source.model=$model" --set "data.sources=[{path: $corpus}]")
quick=(--set 'eval.tasks=[wikitext]')
run() { python3 -m cla_convert.cli run smollm2-135m --out "$out/$1" "${common[@]}" "${@:2}" >/dev/null; }
for name in ${RUNS:-calibrated-26M mean-26M calibrated-6.5M}; do
  case $name in
    calibrated-26M) run "$name" ;;
    mean-26M) run "$name" --set convert.init=mean "${quick[@]}" ;;
    calibrated-6.5M) run "$name" --set train.tokens=6.5M "${quick[@]}" ;;
  esac
done
python3 "$(dirname "$0")/recovery_table.py" "$out"

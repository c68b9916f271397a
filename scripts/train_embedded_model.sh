#!/usr/bin/env bash
# Rebuilds the model that ships in src/whyrank/almanac/model with the project's own verbs, and measures it: about half an
# hour on one CPU core. Usage: scripts/train_embedded_model.sh [WORK_FOLDER [PATH_TO_DATA]]
# The second argument is only for the figures on ordinary text; see scripts/measure_embedded_model.py.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-out/embedded-model}
bin=${BIN:-.venv/bin}
target=src/whyrank/almanac/model

"$bin/whyrank" almanac export --split train --num-queries 6000 --num-irrelevant 5 -o "$work/train"
"$bin/whyrank" distill --judgments "$work/train/judgments.jsonl" --queries "$work/train/queries.jsonl" \
  --corpus "$work/train/corpus.jsonl" --template almanac --modes explain,direct --vocab-size 4096 \
  --optimizer muon --learning-rate 6e-3 --word-dropout 0.1 --num-steps 1800 --num-threads 1 -o "$work/model"

mkdir -p "$target" results/embedded-model
cp "$work"/model/{config.json,generation_config.json,model.safetensors,tokenizer.json,tokenizer_config.json,whyrank.json} \
  "$work/model/chat_template.jinja" "$target/"
cp "$work/model/metrics.jsonl" results/embedded-model/training-log.jsonl
"$bin/python" scripts/measure_embedded_model.py ${2:+"$2"}

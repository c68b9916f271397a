#!/usr/bin/env bash
# Rebuilds the model that ships in src/whyrank/almanac/model, with the project's own verbs.
# About 30 minutes on one CPU core. The shipped weights were made when the rate fell from the end of the warm-up on;
# --decay-fraction 1 (from the first step on) is the nearest setting there is now, so a rebuild is close, not equal. Usage: scripts/train_embedded_model.sh [WORK_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-out/embedded}
whyrank=${WHYRANK:-.venv/bin/whyrank}
target=src/whyrank/almanac/model

"$whyrank" almanac export --split train --num-queries 6000 --num-irrelevant 5 -o "$work/train"
"$whyrank" distill --judgments "$work/train/judgments.jsonl" --queries "$work/train/queries.jsonl" \
  --corpus "$work/train/corpus.jsonl" --template almanac --modes explain,direct --vocab-size 4096 \
  --num-steps 3000 --decay-fraction 1 -o "$work/model"

for mode in explain direct; do
  "$whyrank" almanac export --split test --num-queries 200 -o "$work/test"
  "$whyrank" rerank --run "$work/test/candidates.trec" --corpus "$work/test/corpus.jsonl" \
    --queries "$work/test/queries.jsonl" --model "$work/model" --mode "$mode" -o "$work/$mode"
  "$whyrank" evaluate --qrels "$work/test/qrels.trec" "$work/test/candidates.trec" "$work/$mode/run.trec"
done

mkdir -p "$target"
cp "$work"/model/{config.json,generation_config.json,model.safetensors,tokenizer.json,tokenizer_config.json,whyrank.json} \
  "$work/model/chat_template.jinja" "$target/"
mkdir -p results/embedded-model
cp "$work/model/log.jsonl" results/embedded-model/training-log.jsonl

#!/usr/bin/env bash
# Installs the environment of requirements-eval.txt on a bare machine, then runs the miniature's benchmark offline.
# Everything happens in a temporary folder. PYTHON names the interpreter (3.11 or newer).
set -euo pipefail

cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
PATH="$work/venv/bin:$PATH"
begun=$SECONDS
pip install --quiet --disable-pip-version-check -r requirements.txt
printf '== requirements.txt: %d s, %s\n' $((SECONDS - begun)) "$(du -sh "$work/venv" | cut -f1)"
begun=$SECONDS
pip install --quiet --disable-pip-version-check --no-deps -r requirements-eval.txt
printf '== requirements-eval.txt: %d s, in all %s\n' $((SECONDS - begun)) "$(du -sh "$work/venv" | cut -f1)"

mkdir "$work/code"
tar -c --exclude=./.git --exclude=./runs --exclude=./.venv --exclude=./venv . | tar -x -C "$work/code"
cd "$work/code"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
begun=$SECONDS
python -m data.tiny.benchmark.make
python -m data.benchmarks --frames 64 --verbosity WARNING
printf '== benchmark: %d s\n' $((SECONDS - begun))
python - <<'P'
import json
from pathlib import Path

(file,) = Path("runs/benchmarks").glob("*_results.json")
scores = json.loads(file.read_text())["results"]["longva_tiny"]
assert scores["accuracy,none"] > 3 * scores["chance,none"], scores
P

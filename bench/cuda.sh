#!/usr/bin/env bash
# On a machine with a CUDA device: the oracle tests, then the whole bench, in one go. Writes bench/results/DATE.json.
#
#   bash bench/cuda.sh [options of python -m bench all]
#
# PYTHON: a Python in which this project is installed (make install install-dev); default .venv/bin/python.
# WORKDIR: folder for the synthetic models, about 20 GB for 1B-8B; default: a temporary one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-.venv/bin/python}"
command -v nvidia-smi >/dev/null || { echo "no nvidia-smi: this script is for CUDA machines; use make bench" >&2; exit 1; }

work="${WORKDIR:-$(mktemp -d)}"
[[ -n "${WORKDIR:-}" ]] || trap 'rm -rf "$work"' EXIT
results="bench/results/$(date -u +%Y-%m-%d).json"

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
"$PYTHON" -m pytest tests/oracle -q
"$PYTHON" -m bench all --device cuda --workdir "$work" --json "$results" "$@"
echo "written: $results" >&2

#!/usr/bin/env bash
# Makes requirements/cpu.txt, gpu.txt, dev.txt, ray.txt and docs.txt anew from pyproject.toml, for Linux on x86_64 and aarch64.
#
# Versions already in the locks are kept where they still fit; `scripts/lock.sh --upgrade` takes the newest.
# TORCH_INDEX: the extra index that PyTorch publishes for CPU wheels (cpu.txt pins torch's CPU build), unless
# PIP_FIND_LINKS names a folder that has that build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install 'uv>=0.9' packaging

args=(--quiet --universal --python-version 3.11 --no-header --no-annotate --index-strategy unsafe-best-match "$@")
# vLLM declares these for pictures, sound and video. Their usual builds do not fit the CPU build of torch: with torchvision
# there, transformers does not import ("operator torchvision::nms does not exist"). On a GPU vLLM does not start without
# torchvision, whatever the model is.
without=(torchaudio torchcodec)
not_on_cpus=torchvision
for package in "${without[@]}"; do args+=(--no-emit-package "$package"); done

compile() { # compile NAME OPTION...
  local name=$1
  shift
  [[ $name == gpu ]] || set -- --no-emit-package "$not_on_cpus" "$@"
  "$work/venv/bin/uv" pip compile pyproject.toml "${args[@]}" "$@" --output-file "$work/$name.txt"
}

publish() { # publish NAME HEADING: drops what no supported machine needs, adds the heading
  local left_out=("${without[@]}")
  [[ $1 == gpu ]] || left_out=("$not_on_cpus" "${left_out[@]}")
  {
    echo "# $2"
    echo "# Made by scripts/lock.sh from pyproject.toml; do not edit."
    echo "# Install with: pip install --no-deps -r requirements/$1.txt"
    echo "# Left out on purpose: ${left_out[*]} (scripts/lock.sh says why)."
    "$work/venv/bin/python" scripts/lock_markers.py <"$work/$1.txt"
  } >"requirements/$1.txt"
}

names() { sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' "$1" | sort -u; }

mkdir -p requirements
cpu_torch=()
[[ -z ${TORCH_INDEX:-} ]] || cpu_torch+=(--extra-index-url "$TORCH_INDEX")
[[ -z ${PIP_FIND_LINKS:-} ]] || cpu_torch+=(--find-links "$PIP_FIND_LINKS")
if [[ -f requirements/cpu.txt ]]; then cp requirements/cpu.txt "$work/cpu.txt"; fi
# Declared by intel-openmp's wheel for x86_64 only, which the resolver does not read.
echo "intel-cmplr-lib-ur==2024.2.1 ; sys_platform == 'linux' and platform_machine == 'x86_64'" >"$work/cpu.in"
compile cpu "$work/cpu.in" --extra cpu --extra train "${cpu_torch[@]}"
publish cpu "Everything that serving and training need on a machine without a GPU."

# Where it fits, the version that cpu.txt has: a bug should not depend on the kind of machine.
grep -v -E '^(torch|triton)=' requirements/cpu.txt >"$work/gpu.txt"
echo 'cuda-python>=13' >"$work/constraints" # else an old one that names no version of cuda-bindings is taken
compile gpu --extra gpu --extra train --constraint "$work/constraints"
publish gpu "Everything that serving and training need on a machine with an NVIDIA GPU."

# What tests, linters and type checks need on top, without what both other locks have.
grep -v -E '^(torch|triton)=' requirements/cpu.txt >"$work/dev.txt"
if [[ -f requirements/dev.txt ]]; then cat requirements/dev.txt >>"$work/dev.txt"; fi
compile dev --extra dev --extra bench
comm -12 <(names requirements/cpu.txt) <(names requirements/gpu.txt) | sed 's/\./\\./g; s/.*/^&==/' >"$work/both"
grep -v -f "$work/both" "$work/dev.txt" | grep -v -E '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+|setuptools)==' >"$work/rest"
mv "$work/rest" "$work/dev.txt"
publish dev "What tests, linters and type checks need on top of cpu.txt or gpu.txt."

# What lanes with executor "ray" need on top, without what both other locks have.
grep -v -E '^(torch|triton)=' requirements/cpu.txt >"$work/ray.txt"
if [[ -f requirements/ray.txt ]]; then cat requirements/ray.txt >>"$work/ray.txt"; fi
compile ray --extra ray
grep -v -f "$work/both" "$work/ray.txt" | grep -v -E '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+|setuptools)==' >"$work/rest"
mv "$work/rest" "$work/ray.txt"
publish ray "What executor ray needs on top of cpu.txt or gpu.txt."

# The documentation's site, in an environment of its own.
if [[ -f requirements/docs.txt ]]; then cp requirements/docs.txt "$work/docs.txt"; fi
"$work/venv/bin/uv" pip compile --group pyproject.toml:docs "${args[@]}" --output-file "$work/docs.txt"
publish docs "What make docs needs."
wc -l requirements/*.txt

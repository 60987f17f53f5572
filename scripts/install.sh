#!/usr/bin/env bash
# Installs requirements/DEVICE.txt, as locked, into the environment of PYTHON: scripts/install.sh PYTHON DEVICE
#
# TORCH_INDEX: the extra index that PyTorch publishes for CPU wheels. cpu.txt pins torch's CPU build, which the usual
# package index does not have. Where pip does not find it, the index's ordinary build of the same version is installed,
# with the CUDA libraries that it loads: some gigabytes more, and it works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1 device=$2
pip=("$python" -m pip --disable-pip-version-check --quiet)
lock=requirements/$device.txt
if [[ $device != cpu ]]; then
  exec "${pip[@]}" install --no-deps -r "$lock"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
extra=()
[[ -z ${TORCH_INDEX:-} ]] || extra+=(--extra-index-url "$TORCH_INDEX")
pin=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$lock")
if ! "${pip[@]}" install --no-deps "$pin" "${extra[@]}" 2>"$work/errors"; then
  if ! grep -q "No matching distribution found" "$work/errors"; then
    cat "$work/errors" >&2
    exit 1
  fi
  echo "pip does not find $pin: installing ${pin%+cpu} with its CUDA libraries instead, which is larger and works too." >&2
  echo "For the small build set TORCH_INDEX to the extra index that PyTorch publishes for CPU wheels, and start anew." >&2
  "${pip[@]}" install "${pin%+cpu}" --constraint requirements/gpu.txt
fi
grep -v '^torch==' "$lock" >"$work/others.txt"
"${pip[@]}" install --no-deps -r "$work/others.txt"

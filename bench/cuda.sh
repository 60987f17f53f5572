#!/usr/bin/env bash
# On a machine with a CUDA device: does it start, is it right, how fast is it. Each part runs and reports even if others fail.
#
#   bash bench/cuda.sh [--quick] [--dry-run]
#
# --quick: whether it starts, is right, and how fast it is beside the expert alone; some ten minutes by what each part
# took on an H200. --dry-run: says what would run.
# Writes bench/results/DATE-cuda/: parts.jsonl (one line per part: name, exit status, seconds, command), and for each part
# NAME.log and, where the bench measures, NAME.json; summary.md has all tables. Exits with 1 if any part failed. With
# more than one device a pair on two of them is measured too.
#
# PYTHON: a Python in which this project is installed (make install install-dev); default .venv/bin/python.
# WORKDIR: folder for the synthetic models, about 20 GB for 1B-8B; default: a temporary one.
# OUT: folder for the results.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

quick="" dry=""
for option in "$@"; do
    case "$option" in
        --quick) quick=1 ;;
        --dry-run) dry=1 ;;
        *) echo "unknown option $option; usage: bash bench/cuda.sh [--quick] [--dry-run]" >&2; exit 2 ;;
    esac
done

PYTHON="${PYTHON:-.venv/bin/python}"
out="${OUT:-bench/results/$(date -u +%Y-%m-%d)-cuda}"
memory=0 devices=2
if [[ -z "$dry" ]]; then
    command -v nvidia-smi >/dev/null || { echo "no nvidia-smi: this script is for CUDA machines; use make bench" >&2; exit 1; }
    memory="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)"
    devices="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | wc -l)"
    work="${WORKDIR:-$(mktemp -d)}"
    [[ -n "${WORKDIR:-}" ]] || trap 'rm -rf "$work"' EXIT
    mkdir -p "$out"
    : >"$out/parts.jsonl"
else
    work="${WORKDIR:-WORKDIR}"
fi

# Weights, KV caches and CUDA graphs of the pair, and of one stock server at a time, need some 60 GB.
shape=S
if [[ -n "$dry" || "$memory" -ge 70000 ]]; then shape=1B-8B; fi

failed=0

# part NAME SECONDS COMMAND...: run it, at most so long; note how it went.
part() {
    local name="$1" limit="$2" begin status command
    shift 2
    printf -v command '%q ' "$@"
    if [[ -n "$dry" ]]; then
        printf '%s (at most %s s): %s\n' "$name" "$limit" "$command"
        return
    fi
    command="${command//\\/\\\\}"
    begin=$SECONDS
    echo "== $name: $*" >&2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    printf '{"part": "%s", "status": %d, "seconds": %d, "command": "%s"}\n' \
        "$name" "$status" "$((SECONDS - begin))" "${command//\"/\\\"}" >>"$out/parts.jsonl"
    if [[ "$status" -ne 0 ]]; then
        failed=1
        echo "   failed with $status; the end of $out/$name.log:" >&2
        tail -n 5 "$out/$name.log" >&2
    fi
}

# measure NAME SECONDS OPTIONS...: a bench command that writes NAME.json.
measure() {
    local name="$1" limit="$2"
    shift 2
    part "$name" "$limit" "$PYTHON" -m bench "$@" --device cuda --workdir "$work" --json "$out/$name.json"
}

rounds=3 requests=2
if [[ -n "$quick" ]]; then rounds=1 requests=1; fi
size=(--rounds "$rounds" --requests "$requests")

part device 60 nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv
part versions 120 "$PYTHON" -c 'import torch, vllm; print(vllm.__version__, torch.__version__, torch.version.cuda, torch.cuda.get_device_name(0))'

# Whether it starts at all: the shipped pair, one request at a time.
measure start 600 coordination --shape demo --concurrency 1 --rounds 1 --requests 1 --max-tokens 16

# Whether it is right. Only Triton's attention takes float32 on CUDA, and multiplies in TF32 unless told otherwise.
# A GPU compiles each engine that a test starts, for half a minute.
oracle=(tests/oracle) oracle_v2=(tests/oracle/test_model_runner_v2.py tests/oracle/test_one_lane.py -m "")
if [[ -n "$quick" ]]; then
    oracle=("tests/oracle/test_greedy.py::test_equals_the_oracle[lockstep]"
        tests/oracle/test_greedy.py::test_demo_pair_equals_the_oracle tests/oracle/test_sampling.py::test_seed_alone_and_in_a_batch)
    oracle_v2=(tests/oracle/test_model_runner_v2.py::test_greedy_equals_the_oracle)
fi
part oracle 7200 env TRITON_F32_DEFAULT=ieee "$PYTHON" -m pytest "${oracle[@]}" -q -n0
# The same on vLLM's other model runner. Which is the default on CUDA is decided by these and by runner-v2 below.
part oracle-v2 1800 env TRITON_F32_DEFAULT=ieee "$PYTHON" -m pytest "${oracle_v2[@]}" -q -n0

# What keeps the device busy (the reports' "device busy"): each step waited for, lanes interleaved, the base ahead too.
depths=(0 1 2)
if [[ -n "$quick" ]]; then depths=(1); fi
for depth in "${depths[@]}"; do
    measure "in-flight-$depth" 1800 coordination --shape "$shape" --concurrency 1 32 256 --deferral 0 0.3 \
        --scheduler "steps_in_flight=$depth" "${size[@]}"
done
measure runner-v2 1800 coordination --shape "$shape" --concurrency 1 32 256 --deferral 0 0.3 \
    --scheduler model_runner=v2 "${size[@]}"
# What is drawn instead of the most probable token; a gate, of the shipped pair and on large models; long prompts.
if [[ -z "$quick" ]]; then
    measure sampling 1800 coordination --shape "$shape" --concurrency 1 32 256 --deferral 0.3 --temperature 1 --top-p 0.95 \
        "${size[@]}"
    measure gate 1800 coordination --shape demo --concurrency 1 32 256 "${size[@]}"
    measure context 1800 context --shape "$shape" --rounds "$rounds"
    measure gate-made-up 1800 coordination --shape "$shape" --made-up-gate --concurrency 1 32 256 --deferral gate \
        "${size[@]}"
    measure prompts-2k 1800 coordination --shape "$shape" --concurrency 1 32 --deferral 0.3 --prompt 2k "${size[@]}"
    measure prompts-8k 1800 coordination --shape "$shape" --concurrency 1 8 --deferral 0.3 --prompt 8k "${size[@]}"
    measure pacing 1800 pacing --shape "$shape" --concurrency 32 256 --deferral 0.1 0.3 "${size[@]}"
fi
if [[ -z "$quick" && "$devices" -gt 1 ]]; then
    measure two-devices 1800 coordination --shape "$shape" --two-devices --concurrency 1 32 256 --deferral 0 0.3 \
        --scheduler coordination=overlapped "${size[@]}"
fi

# Against what many would use instead: each model alone, one HTTP request per token, and the expert with the base as its
# draft model. Servers are started one at a time, since a device does not hold all of them. The shipped pair has questions
# with answers: quality beside speed.
cells=(--concurrency 1 32 256 --deferral 0 0.3 1)
if [[ -n "$quick" ]]; then
    cells=(--concurrency 32 --deferral 0.3 1 --prompt short --contenders engine "stock expert")
fi
measure compare 10800 compare --shape "$shape" "${cells[@]}" --starts each-round "${size[@]}"
if [[ -z "$quick" ]]; then
    measure quality 3600 compare --shape demo --concurrency 32 --deferral gate 1 --prompt short --starts each-round \
        --rounds 1 --requests 2
fi

# The exact mode on Hopper and later: one answer alone and in any batch, in bfloat16 too.
if [[ -z "$quick" ]]; then
    part batch-invariant 1800 env VLLM_BATCH_INVARIANT=1 "$PYTHON" -m bench coordination --device cuda --workdir "$work" \
        --shape demo --concurrency 1 32 --rounds 1 --requests 1 --json "$out/batch-invariant.json"
fi

[[ -n "$dry" ]] && exit 0
for table in "$out"/*.json; do
    name="$(basename "$table" .json)"
    printf '## %s\n\n' "$name"
    grep '^|' "$out/$name.log"
    printf '\n'
done >"$out/summary.md"
echo "written: $out" >&2
exit "$failed"

#!/usr/bin/env bash
# A first run on a GPU: correctness, then the figures, the most important first.
#
#   bash benchmarks/gpu.sh [SECONDS]           the first part, 540 seconds by default; 0 = no limit
#   bash benchmarks/gpu.sh --second [SECONDS]  the rest: failed tests, missing rows, profiles; 180 seconds
#   bash benchmarks/gpu.sh --all               both and everything else, without a limit: make gpu
#   bash benchmarks/gpu.sh --tiny              the first part and the second at a tiny size, on a CPU too
#
# Each step has a time limit and a log; if one fails, the next one starts. At exit, also after a signal, gpu.tgz with
# logs, JUnit XML, JSON, traces and the table is written to $OUT (default benchmarks/results), and the table is
# printed. Exit code 1 if a step failed. PYTHON names the interpreter. benchmarks/README.md has the details.
set -u
cd "$(dirname "$0")/.." || exit
PART=first LIMIT=540 TINY=()
case "${1:-}" in
  --second) PART=second LIMIT=${2:-180} ;;
  --all) PART=all LIMIT=0 ;;
  --tiny) PART=tiny LIMIT=0 TINY=(--tiny) ;;
  '') ;;
  *[!0-9]*) echo "gpu.sh: expected SECONDS, --second, --all or --tiny, got $1" >&2; exit 2 ;;
  *) LIMIT=$1 ;;
esac
PY=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/results}
LOGS=$(mktemp -d)
FAILED=()
SECONDS=0
mkdir -p "$OUT"

finish() {
  trap - EXIT INT TERM
  jobs -p | xargs -r kill 2>/dev/null
  wait
  { echo; "$PY" -m benchmarks.summary; } >"$LOGS/table.txt" 2>&1
  cp benchmarks/results/*.json{,.gz} fastalign/ops/attention/table.json "$LOGS" 2>/dev/null
  [ $PART = tiny ] && rm -f "$LOGS"/*.json{,.gz}
  tar czf "$OUT/gpu.tgz" -C "$LOGS" .
  cat "$LOGS/table.txt"
  [ ${#FAILED[@]} -eq 0 ] || echo "failed: ${FAILED[*]}"
  echo "$OUT/gpu.tgz after $SECONDS s"
  rm -rf "$LOGS"
  [ ${#FAILED[@]} -eq 0 ] && exit 0
  exit 1
}
trap finish EXIT
trap 'FAILED+=(interrupted); exit 1' INT TERM

# step NAME SECONDS COMMAND...: run with a time limit; no step starts after the overall limit.
step() {
  local name=$1 limit=$2 status before=$SECONDS
  shift 2
  if [ "$LIMIT" -gt 0 ]; then
    local left=$((LIMIT - SECONDS - 5))
    [ $left -ge 5 ] || { echo "$name: no time left" | tee -a "$LOGS/steps.txt"; FAILED+=("$name"); return 1; }
    [ "$limit" -le $left ] || limit=$left
  else
    limit=0
  fi
  timeout -s "${SIGNAL:-TERM}" -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  echo "$name: exit $status after $((SECONDS - before)) s (at $SECONDS s)" | tee -a "$LOGS/steps.txt"
  [ $status -eq 0 ] || { FAILED+=("$name"); tail -n 3 "$LOGS/$name.log"; return 1; }
}

tests() { # NAME SECONDS PYTEST-ARGUMENTS...: a step of pytest, in ten processes if pytest-xdist is installed
  local name=$1 limit=$2 workers=()
  shift 2
  [ $PART != tiny ] && "$PY" -c "import xdist" 2>/dev/null && workers=(-n 10)
  # Interrupted by SIGINT, pytest still writes its XML and what has failed.
  SIGNAL=INT step "$name" "$limit" "$PY" -m pytest -q "${workers[@]}" --junitxml="$LOGS/$name.xml" "$@"
}

measure() { # NAME SECONDS MODULE ARGUMENTS...: a step of a benchmark
  local name=$1 limit=$2 module=$3
  shift 3
  [ $PART = tiny ] && set --
  step "$name" "$limit" "$PY" -m "benchmarks.$module" "${TINY[@]}" "$@"
}

prepare() {
  if ! "$PY" -c "import pydantic" 2>/dev/null && [ -d .whl ]; then
    step wheels 30 "$PY" -m pip install -q --no-index --no-deps --no-compile --target "$LOGS/site" .whl/*.whl
    mv "$LOGS/site" "${SITE:=$(mktemp -d)}/site" && export PYTHONPATH="$SITE/site${PYTHONPATH:+:$PYTHONPATH}"
  fi
  # An extension from another machine is used if it loads: it has torch's stable ABI.
  "$PY" -c "
import torch
from fastalign.ops import extension
raise SystemExit(not extension.available(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))" 2>/dev/null ||
    step extension 120 "$PY" setup.py -q build_ext --inplace
  step doctor 60 "$PY" -m fastalign.doctor
}

first() {
  if [ $PART = tiny ]; then
    tests tests 60 tests/utils/test_random.py
    measure warm 60 step --warm
  else
    # Inductor's disk cache fills during the tests, when nothing is timed.
    tests tests 130 tests/kernels tests/ops/test_ops.py tests/ops/test_attention.py tests/ops/test_extension.py \
      tests/test_gpu.py -k "not without_a_gpu and not test_aot" &
    measure warm-b 130 step --warm --only B/16-224 &
    measure warm-l 130 step --warm --only L/14-336 &
    wait
    for name in tests warm-b warm-l; do
      grep -q "^$name: exit 0 " "$LOGS/steps.txt" || FAILED+=("$name")
    done
  fi
  measure step-b 85 step --only B/16-224
  [ $PART = tiny ] || measure step-l 150 step --only L/14-336
  measure attention 70 attention --cases "T 197 d 64 cap" "T 577 d 64 cap"
  measure kernels 70 kernels --cases B/16-224 --ops mask_tokens expand_masked pack unpack reconstruction_loss
}

second() {
  if [ $PART != tiny ]; then
    grep -q '"' .pytest_cache/v/cache/lastfailed 2>/dev/null && tests failed-tests 60 --last-failed -vv --tb=long tests
    measure missing 90 step --missing --only B/16-224 L/14-336
    command -v ncu >/dev/null && step ncu 60 ncu --set detailed --clock-control none --launch-count 6 \
      --kernel-name "regex:(forward|dq|dkdv)" --export "$LOGS/attention" \
      "$PY" -m benchmarks.attention --once --cases "T 577 d 64 cap"
  fi
  measure fp8 40 fp8
  measure profile 60 profile
}

rest() { # lower priority
  measure step 0 step --missing
  measure attention-all 0 attention
  measure kernels-all 0 kernels
  measure masks 0 masks
  measure checkpoint 0 checkpoint
  local gpus
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU)
  for ranks in 1 2 4 8; do
    [ $ranks -le "$gpus" ] && step "scaling-$ranks" 0 "$PY" -m torch.distributed.run --standalone \
      --nproc-per-node=$ranks -m benchmarks.scaling
  done
  "$PY" -c "import nvidia.dali" 2>/dev/null && measure data 0 data
}

prepare
case $PART in
  first) first ;;
  second) second ;;
  tiny) first; second ;;
  all) first; second; rest ;;
esac

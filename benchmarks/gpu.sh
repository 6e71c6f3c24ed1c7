#!/bin/bash
# GPU tests, compute-sanitizer and benchmarks in one call of at most ten minutes; tables come last.
#
#     bash benchmarks/gpu.sh              # JSON and logs under $OUT, by default a temporary folder
#     PYTHON=python3 OUT=out bash benchmarks/gpu.sh
#
# Each part has its own limit, so that one that hangs does not cost the others.  Not run on a GPU yet.
set -u
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
export PYTHONPATH=$PWD
mkdir -p "$OUT"
failed=0

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "error: $PYTHON has no torch that sees an NVIDIA GPU: set PYTHON, install the driver, or a torch for CUDA" >&2
  exit 1
fi

part() {  # name, seconds, command
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  echo "$name: $([ $status = 0 ] && echo passed || echo "FAILED with $status, see $OUT/$name.log") in $((SECONDS - start)) s"
  [ $status = 0 ] || { failed=1; tail -n 15 "$OUT/$name.log"; }
}

part tests 150 "$PYTHON" -m pytest -q tests/gpu
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m pytest -q -x tests/gpu -k "sanitized"
  done
else
  echo "memcheck, racecheck: not run: no compute-sanitizer on the PATH"
fi
part cuda_linear 140 "$PYTHON" benchmarks/cuda_linear.py --tokens 1 8 16 64 256 2048 --json "$OUT/cuda_linear.json"
part decode 140 "$PYTHON" benchmarks/decode.py --device cuda --shape 8B --batch 1 8 32 --head 16 4 --rounds 3 \
  --schemes bf16 w4a16 w8a8 w4a8 --json "$OUT/decode.json"
for table in decode cuda_linear; do
  [ -s "$OUT/$table.json" ] && cat "$OUT/$table.log"
done
echo "results: $OUT"
exit $failed

#!/bin/sh
# For a machine with an NVIDIA GPU, offline: builds, runs the GPU tests, then the microbenchmarks, and prints a short table.
# PY the interpreter; PARTS=test,bench; OPS="stem ..." limits both. What fails does not stop the rest; the exit code tells.
PY=${PY:-python3}
PARTS=${PARTS:-test,bench}
status=0
mkdir -p build
log=build/gpu.log
: > "$log"

"$PY" - <<'CHECK' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("make gpu: torch sees no CUDA device; run it on a machine with an NVIDIA GPU")
print("make gpu:", torch.cuda.get_device_name(), "torch", torch.__version__)
CHECK

if ! MAX_JOBS=$(nproc) "$PY" -m pip install --quiet --no-build-isolation --no-deps --no-index -e . >> "$log" 2>&1; then
  tail -40 "$log"
  echo "make gpu: BUILD FAILED, see $log"
  exit 1
fi
"$PY" -m deepfusion_kernels

case ",$PARTS," in *,test,*)
  if [ -n "$OPS" ]; then
    files=""
    for op in $OPS; do files="$files $(ls tests/ops/test_${op}*.py)"; done
  else
    files="tests/ops tests/nn tests/test_patching.py"
  fi
  # shellcheck disable=SC2086
  { "$PY" -m pytest -q $files 2>&1; echo $? > build/gpu.code; } | tee -a "$log" | tail -40
  [ "$(cat build/gpu.code)" = 0 ] || status=1
esac

case ",$PARTS," in *,bench,*)
  arguments=""
  for op in $OPS; do arguments="$arguments --op $op"; done
  # shellcheck disable=SC2086
  { "$PY" benchmarks/run.py --dtype bfloat16 $arguments 2>&1; echo $? > build/gpu.code; } | tee -a "$log" | tail -60
  [ "$(cat build/gpu.code)" = 0 ] || status=1
esac
[ $status = 0 ] && echo "make gpu: all green" || echo "make gpu: FAILURES, see $log"
exit $status

#!/bin/sh
# For a machine with an NVIDIA GPU, offline: builds in place, runs the GPU tests, then the microbenchmarks, and ends with a
# short table. Every test file and every op runs in a process of its own, since one illegal access spoils a CUDA context.
# PY the interpreter; PARTS=test,bench; OPS="stem ..." limits both; LIMIT seconds for one step.
# What fails does not stop the rest; the exit code tells: 0 all green, 1 something failed, 2 asked wrongly or no GPU.
PY=${PY:-python3}
PARTS=${PARTS:-test,bench}
LIMIT=${LIMIT:-900}
stems=$(cd deepfusion_kernels/ops && ls -d */ | tr -d / | grep -v -e shared -e __pycache__)
log=build/gpu.log
failed=""

for part in $(echo "$PARTS" | tr , ' '); do
  case $part in
    test | bench) ;;
    *) echo "make gpu: PARTS must be test, bench or both, got $part"; exit 2 ;;
  esac
done
for op in $OPS; do
  echo "$stems" | grep -qx "$op" || { echo "make gpu: OPS must be of $(echo $stems), got $op"; exit 2; }
done
mkdir -p build
: > "$log"

"$PY" - << 'CHECK' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("make gpu: torch sees no CUDA device; run it on a machine with an NVIDIA GPU")
print("make gpu:", torch.cuda.get_device_name(), "torch", torch.__version__)
CHECK

# A name, how many closing lines to show, a command.
step() {
  name=$1 lines=$2
  shift 2
  { timeout "$LIMIT" "$@" 2>&1; echo $? > build/gpu.code; } | tee -a "$log" | tail -n "$lines"
  code=$(cat build/gpu.code)
  [ "$code" = 0 ] && return 0
  echo "make gpu: $name FAILED with code $code, see $log"
  failed="$failed $name"
  return 1
}

test_files() {
  [ -n "$OPS" ] || find tests/ops tests/nn tests/test_patching.py -name 'test_*.py' | sort
  for op in $OPS; do
    { ls tests/ops/test_"$op"*.py; grep -lE "^STEMS? = .*\"$op\"" tests/ops/test_*.py; } 2> /dev/null
  done | sort -u
}

# In place and without pip: nothing is fetched, and the environment stays as it was found.
MAX_JOBS=$(nproc) step build 30 "$PY" setup.py --quiet build_ext --inplace || exit 1
step build-info 80 "$PY" -m deepfusion_kernels

case ",$PARTS," in
  *,test,*) for file in $(test_files); do step "$file" 12 "$PY" -m pytest -q "$file"; done ;;
esac
case ",$PARTS," in
  *,bench,*)
    for op in ${OPS:-$stems}; do
      step "bench:$op" 40 "$PY" benchmarks/run.py --dtype bfloat16 --op "$op"
    done
    ;;
esac

[ -z "$failed" ] && echo "make gpu: all green" || echo "make gpu: FAILED:$failed; see $log"
case ",$PARTS," in
  *,bench,*) step table 60 "$PY" benchmarks/tables.py --short ;;
esac
[ -z "$failed" ]

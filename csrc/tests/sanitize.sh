#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests.
set -eu
PY=${PY:-python3}
root=$(pwd)
build=$root/build/sanitize
export PATH="$(dirname "$PY"):$PATH"
mkdir -p "$build"
# this processor's own level alone, optimised as in a release: sums in another order round differently
cmake -S . -B "$build" -GNinja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDF_SANITIZE=ON -DDF_WITH_CUDA=OFF -DDF_LEVELS=native \
  -DPython_EXECUTABLE="$PY" -DCMAKE_INSTALL_PREFIX="$build/package/deepfusion_kernels" > "$build/configure.log" \
  || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" > "$build/build.log" 2>&1 || { tail -50 "$build/build.log"; exit 1; }
rm -rf "$build/package"
mkdir -p "$build/package"
cp -r deepfusion_kernels tests pyproject.toml "$build/package/"
rm -f "$build"/package/deepfusion_kernels/*.so
cmake --install "$build" --component python > /dev/null
cd "$build/package"
runtime() { gcc -print-file-name="$1"; }
LD_PRELOAD="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TRITON_INTERPRET=0 \
  "$PY" -m pytest -q -x tests/ops tests/nn -k "cpu and not compile" -p no:cacheprovider

#!/usr/bin/env bash
# Builds the kernels and fuzz.cc with a sanitizer and runs CALLS random calls: sanitize.sh address,undefined|thread CALLS
set -euo pipefail
sanitizer=$1 calls=$2
cd "$(dirname "$0")/../.."
folder=build/sanitize-${sanitizer/,/-}
mkdir -p "$folder"
flags=(-std=c++17 -O1 -g1 -fno-omit-frame-pointer "-fsanitize=$sanitizer" -fno-sanitize-recover=all)

kernels() { # name, bytes of a register, flags of the instruction set
  g++ "${flags[@]}" "-DNEIGHBORHOOD_INSTRUCTION_SET=$1" "-DNEIGHBORHOOD_VECTOR_BYTES=$2" "${@:3}" \
    -c neighborhood/csrc/kernels.cc -o "$folder/$1.o"
}
kernels avx512 64 -mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma &
kernels avx2 32 -mavx2 -mfma -mf16c &
wait -n; wait -n
kernels baseline 16
g++ "${flags[@]}" neighborhood/csrc/attention.cc neighborhood/csrc/thread_pool.cc tests/neighborhood/fuzz.cc \
  "$folder"/{avx512,avx2,baseline}.o -lpthread -o "$folder/fuzz"
"$folder/fuzz" "$calls" "${3:-1}"

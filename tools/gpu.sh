#!/usr/bin/env bash
# What only a machine with a GPU can show, in phases of less than ten minutes each.
#
#   tools/gpu.sh [-n] [PHASE...]    all phases, in this order, where none is named; -n only prints
#
# with the minutes that each is reckoned to take with 16 cores (not measured yet):
#
#   build     2  the kernels, for the GPU of this machine
#   check     2  `stylegan_fast check` of the CUDA kernels
#   test      5  the tests that reach a GPU, but for Triton's
#   triton    8  Triton's: thousands of kernels are compiled, which a second run finds
#   peers     5  the checkouts in peers/ compile their kernels
#   tune      8  convolutions are measured, and the faster ones remembered
#   bench     9  the benchmark suite, with those peers
#   sanitize  6  memory and race checkers, on a few tests
#
# A phase that fails or reaches its LIMIT gives way to the next one, and all of them may be stopped
# at any time: what was measured until then is kept. Environment:
#
#   OUT      where logs, results and measured choices go (default gpu-out)
#   LIMIT    seconds a phase may take (default 570)
#   TOTAL    seconds all of them may take (default: as many as their limits allow)
#   WORKERS  processes that test (default: the cores, at most 16)
#   TORCH_CUDA_ARCH_LIST  what to build for (default: the GPU of this machine)
#   STYLEGAN_FAST_LEVELS  baseline builds sooner, with slower kernels for the CPU
set -uo pipefail
cd "$(dirname "$0")/.."

ALL=(build check test triton peers tune bench sanitize)
dry=
if [ "${1:-}" = -n ]; then
    dry=yes
    shift
fi
phases=("${@:-${ALL[@]}}")
for phase in "${phases[@]}"; do
    if [[ " ${ALL[*]} " != *" $phase "* ]]; then
        echo "there is no phase '$phase'; choose among: ${ALL[*]}" >&2
        exit 2
    fi
done

OUT=${OUT:-gpu-out}
LIMIT=${LIMIT:-570}
TOTAL=${TOTAL:-$((LIMIT * ${#phases[@]}))}
cores=$(nproc)
WORKERS=${WORKERS:-$((cores < 16 ? cores : 16))}
CHOICES=$PWD/build/gpu/choices
compiled_peers=build/gpu/peers
export PYTHONUNBUFFERED=1

# run SECONDS COMMAND...: that long at most, and no longer than the phase may take.
run() {
    local limit=$1 left=$((phase_end - SECONDS))
    shift
    limit=$((limit < left ? limit : left))
    echo "+ $*"
    if [ -n "$dry" ]; then
        return
    fi
    if [ "$limit" -le 0 ]; then
        echo "no time is left for this"
        return 1
    fi
    # As by Ctrl-C: what is interrupted reports what it has.
    timeout --foreground --signal=INT --kill-after=20 "$limit" "$@"
}

phase_build() {
    local capability='print("{}.{}".format(*torch.cuda.get_device_capability()))'
    if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ] && [ -z "$dry" ]; then
        TORCH_CUDA_ARCH_LIST=$(python -c "import torch; $capability") || return
        export TORCH_CUDA_ARCH_LIST
    fi
    # Offline: what `make install` brought is enough to build.
    STYLEGAN_FAST_CUDA=on PIP_DISABLE_PIP_VERSION_CHECK=1 run "$time" \
        python -m pip install --no-deps --no-build-isolation -e . || return
    run 60 python -m stylegan_fast info
}

phase_check() { run "$time" python -m stylegan_fast check --device cuda --backend cuda; }

# What tests choose with others beside them is not kept.
tests() {
    STYLEGAN_FAST_TEST_DEVICE=cuda STYLEGAN_FAST_CACHE=off OMP_NUM_THREADS=1 \
        TORCHINDUCTOR_COMPILE_THREADS=1 run "$@"
}

parallel_tests() {
    local hanging=()
    # A kernel that hangs blocks its process for good: xdist starts another one.
    if [ -z "$dry" ] && python -c 'import pytest_timeout' 2> /dev/null; then
        hanging=(--timeout=240 --timeout-method=thread)
    fi
    tests "$time" python -m pytest -v --benchmark-disable -n "$WORKERS" --dist worksteal \
        --durations=15 "${hanging[@]}" -m '(device or gpu) and not exhaustive' -k "$1"
}

phase_test() { parallel_tests 'not triton'; }

phase_triton() { parallel_tests triton; }

# minutes PERCENT: that much of what the phase may take.
minutes() { awk "BEGIN { print $time * $1 / 6000 }"; }

# suite MINUTES ARGUMENTS...: the rest of the phase is for the case at the end, and the report.
suite() {
    STYLEGAN_FAST_CACHE=$CHOICES run "$time" \
        python -m stylegan_fast bench --device cuda --minutes "$@"
    local status=$?
    [ -n "$dry" ] || cp "$CHOICES"/*.json "$OUT" 2> /dev/null
    return $status
}

checkouts() {
    local checkout
    for checkout in peers/*/; do
        [ -d "$checkout" ] && printf -- '--peer\n%s\n' "$checkout"
    done
}

phase_peers() {
    local found
    mapfile -t found < <(checkouts)
    rm -f "$compiled_peers"
    if [ "${#found[@]}" -eq 0 ]; then
        echo "no checkouts in peers/"
        return
    fi
    suite 1 --quick --op bias_act --shape 2x8x4x4 --mode forward --layout nchw \
        --out build/gpu/bench "${found[@]}" || return
    [ -n "$dry" ] || touch "$compiled_peers"
}

# First, all cores compile the networks' Triton kernels: what competes for a GPU measures nothing.
phase_tune() {
    local shape dtype
    for shape in {1,8}x3x{256x256,1024x1024}; do
        for dtype in float32 bfloat16; do
            STYLEGAN_FAST_CACHE=off run $((time / 2)) python -m stylegan_fast bench \
                --device cuda --op networks --mode forward --shape $shape --dtype $dtype \
                --seconds 0 --out build/gpu/$shape-$dtype &
        done
    done
    wait
    suite "$(minutes 40)" --tune --mode forward --seconds 0.1 --out "$OUT"
}

phase_bench() {
    local found=() status=0
    # Where they could not be compiled, they would be tried again with every part.
    [ -e "$compiled_peers" ] && mapfile -t found < <(checkouts)
    part() {
        suite "$(minutes "$1")" --out "$OUT" --seconds 0.3 "${@:2}" "${found[@]}" || status=1
    }
    part 28 --op networks
    part 13 --op training swap
    part 13 --op layers --no-compile
    part 10 --op upfirdn2d --no-compile --dtype float32 float16
    part 5 --op filtered_lrelu --no-compile --dtype float32 float16
    part 6 --op bias_act adain --no-compile --dtype float32 float16 --mode forward backward
    part 10 --op upfirdn2d bias_act --shape 4x64x128x128 --dtype float32 --mode forward
    return $status
}

phase_sanitize() {
    if [ -z "$dry" ] && ! command -v compute-sanitizer; then
        echo "compute-sanitizer is not installed: no memory and race checks"
        return
    fi
    local files=(bias_act upfirdn2d upfirdn2d_epilogue epilogue_backward filtered_lrelu)
    files+=(adain demodulation)
    local few='any_strides or workloads or layouts or low_precision or parts_of_planes or values'
    few+=' or not_finite'
    files=("${files[@]/#/tests/test_}")
    local status=0 tool
    for tool in memcheck racecheck; do
        # Without torch's caching, every tensor has borders that the checker can see. Only what
        # the package's kernels do is reported, not what PyTorch asks of a driver in vain.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 tests $((time / 2)) \
            compute-sanitizer --tool $tool --error-exitcode 1 --kernel-name kns=stylegan_fast \
            $([ $tool = memcheck ] && echo --report-api-errors no) \
            python -m pytest -v --benchmark-disable -m 'device and not exhaustive' \
            -k "cuda and ($few)" "${files[@]/%/.py}" || status=1
    done
    return $status
}

all_phases() {
    local phase failed=() begun time stopped=
    trap 'stopped=yes; kill $(jobs -p) 2> /dev/null' INT
    echo "$(date -u +%FT%TZ) at $(git rev-parse HEAD 2> /dev/null || echo 'an unknown commit')"
    for phase in "${phases[@]}"; do
        begun=$SECONDS
        time=$((TOTAL - SECONDS < LIMIT ? TOTAL - SECONDS : LIMIT))
        phase_end=$((SECONDS + time))
        echo "== $phase"
        "phase_$phase" || failed+=("$phase")
        echo "== $phase: $((SECONDS - begun)) s"
        [ -z "$stopped" ] || break
    done
    if [ "${#failed[@]}" -gt 0 ]; then
        echo "FAILED: ${failed[*]}"
        return 1
    fi
}

screen() {
    trap '' INT  # until the phase has said what it has
    tee -a "$OUT/gpu.log" | grep --line-buffered -Ev ' (PASSED|SKIPPED)( |$)|^tests/.* $'
}

if [ -n "$dry" ]; then
    all_phases
    exit
fi
mkdir -p "$OUT" "$CHOICES"
all_phases 2>&1 | screen
exit "${PIPESTATUS[0]}"

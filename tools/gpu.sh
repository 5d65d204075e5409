#!/usr/bin/env bash
# What only a machine with a GPU can show: the kernels built for it, every test on it, the memory
# and race checkers, and the benchmark suite against the checkouts in peers/.
set -euo pipefail
cd "$(dirname "$0")/.."

# Offline: what `make install` brought is enough to build.
STYLEGAN_FAST_CUDA=on python -m pip install --no-deps --no-build-isolation -e .
export STYLEGAN_FAST_TEST_DEVICE=cuda
pytest --benchmark-disable

if command -v compute-sanitizer; then
    for tool in memcheck racecheck; do
        # Without torch's caching, every tensor has borders that the checker can see.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            --target-processes all pytest -k "any_strides or epilogue or workloads or layouts" \
            tests/test_bias_act.py tests/test_upfirdn2d.py
    done
else
    echo "compute-sanitizer is not installed: no memory and race checks" >&2
fi

peers=()
for checkout in peers/*/; do
    [ -d "$checkout" ] && peers+=(--peer "$checkout")
done
python -m stylegan_fast bench --out benchmarks/results "${peers[@]}"

#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than nine minutes:
#   build, tests, compute-sanitizer on small shapes, benchmarks.
# Each stage has its own time limit and none stops the next. The log says how each one ended; the
# exit status is 1 if one failed. Without a GPU only the build and what runs without one are checked.
#
#   OUT=folder PYTHON=python3 bash bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu.log
DEADLINE=$((SECONDS + 530))
FAILED=0
: >"$LOG"

say() { echo "$*" | tee -a "$LOG"; }

# stage NAME LIMIT COMMAND...: at most LIMIT seconds, and no later than the deadline.
stage() {
    local name=$1 limit=$2 began=$SECONDS status outcome
    shift 2
    local left=$((DEADLINE - SECONDS))
    if ((left < limit)); then limit=$left; fi
    if ((limit <= 0)); then
        say "stage $name: FAILED, no time left"
        FAILED=1
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    case $status in
    0) outcome=passed ;;
    124 | 137) outcome="FAILED, over its $limit s" ;;
    *) outcome="FAILED, status $status" ;;
    esac
    if ((status != 0)); then
        FAILED=1
        tail -n 15 "$OUT/$name.log" >>"$LOG"
    fi
    say "stage $name: $outcome, $((SECONDS - began)) s; $(tail -n 1 "$OUT/$name.log")"
}

finish() {
    say "done in $SECONDS s, $(if ((FAILED)); then echo "at least one stage FAILED"; else echo "all stages passed"; fi)"
    exit "$FAILED"
}

run_pytest() {
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider "$@"
}

say "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%FT%TZ)"
"$PYTHON" - 2>&1 <<'END' | tee -a "$LOG"
import importlib.metadata as m, platform
names = "torch", "triton", "numpy", "pybind11", "pytest", "pytest-benchmark"
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return "absent"
print("python", platform.python_version(), *(f"{name} {version(name)}" for name in names))
END
if command -v nvcc >/dev/null; then nvcc --version | tail -n 2 | tee -a "$LOG"; fi

if ! nvidia-smi -L >/dev/null 2>&1; then
    say "no GPU: only what needs none is checked"
    stage build 120 env IMU_FAST_BUILD_EXT=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
    run_pytest gates 300 bench/test_mean_gradient.py bench/test_gram.py --benchmark-disable
    finish
fi
nvidia-smi | tee -a "$LOG"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu \
    --format=csv | tee -a "$LOG"

stage build 120 env IMU_FAST_BUILD_EXT=1 IMU_FAST_BUILD_CUDA=1 \
    "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
run_pytest tests_kernels 150 tests/kernels/test_kernels_gpu.py
run_pytest tests_solvers 60 tests/solvers/cholesky \
    tests/unlearning/ascent/test_graph.py

# One odd shape and one ragged one of every kernel; caches are warm from the tests. The caching
# allocator would hide what runs past a tensor's end.
SMALL='(float32 and larger and small and tile) or test_conjugate_gradient'
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        stage "sanitizer_$tool" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_kernels_gpu.py -k "$SMALL"
    done
else
    say "stage sanitizer: FAILED, no compute-sanitizer on PATH"
    FAILED=1
fi

# One process and one JSON per suite: a slow one costs no other its results.
run_pytest bench_cholesky 40 bench/test_cholesky.py -k on_cuda --benchmark-json="$OUT/cholesky.json"
run_pytest bench_mixed_precision 30 bench/test_cholesky.py -k "mixed_precision and not 16384" \
    --benchmark-json="$OUT/mixed_precision.json"
for suite in bilinear_scores fisher_diagonal softmax_residual head_ascent conjugate_gradient \
    ggn_product gram mean_gradient linear_softmax; do
    run_pytest "bench_$suite" 60 "bench/test_$suite.py" --benchmark-json="$OUT/$suite.json"
done
run_pytest bench_mixed_precision_large 60 bench/test_cholesky.py -k "mixed_precision and 16384" \
    --benchmark-json="$OUT/mixed_precision_large.json"
finish

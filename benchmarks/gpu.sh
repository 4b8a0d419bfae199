#!/usr/bin/env bash
# The GPU tests and benchmarks, on a machine that has CUDA and PyTorch; nothing is downloaded.
# `make gpu` is this.
#
#   STAGES="kernels models"  only these, of those below; the table comes last whatever runs
#   OUT=folder               takes <gpu>/<suite>.json, gpu.log, gpu-table.txt (benchmarks/results)
#   LIMIT=seconds            the whole call ends by then; stages share what is left, as below
#   ALLOW_DIRTY=1            measure a tree with uncommitted changes
#   FRESH=1                  forget what earlier calls did
#   VITRAIL_COMMIT=hash      whose files these are, in a copy without git; "-dirty" behind it says so
#   PYTHON=program           the Python that has torch (python3)
#
# The stages, most wanted first, and what they need on one H100 with 16 cores, in minutes; estimates,
# none was run yet:
#
#   env build precompile  4   versions; the extension and CUDA images; kernels, by all cores
#   native                3   native == triton bits, graphs, threads, memory, export, C++
#   latency               3   batch 1 against CUDA graphs of PyTorch; a process's first embedding
#   models                6   whole models against PyTorch
#   host                  1   host time of a forward
#   tests                 6   the other GPU tests
#   kernels               3   kernels against PyTorch, and matmul and copy at best
#   sanitizer             5   memcheck and racecheck of small models
#   ceilings              1   matmul, copy and attention at best, in a file of their own
#
# A stage takes at most 9 minutes. Call again to go on: what passed with the same files on the same
# GPU is not run again, and a suite that ran out of time goes on with its next case. The exit code is
# 1 where a stage failed or is not finished; the stages after it run all the same. Where there are
# ten minutes: LIMIT=570 STAGES='env build precompile native latency models'.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

ALL='env build precompile native latency models host tests kernels sanitizer ceilings'
declare -A MINUTES=([native]=3 [latency]=3 [models]=6 [host]=1 [tests]=6 [kernels]=3 [sanitizer]=5
    [ceilings]=1) # of those that are of use when cut short; the first three are not
STAGE_LIMIT=${STAGE_LIMIT:-540}
SHORTEST=75
NOT_RUN=4 UNFINISHED=3 # exit codes of a stage
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD/engine:$PWD/kernels:$PWD/tests PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
PATH=$PATH:/usr/local/cuda/bin

# ---- stages; $1: seconds it may take

stage_env() {
    nvidia-smi || true
    "$python" -c '
import json, sys
sys.path.insert(0, "benchmarks")
import torch
from environment import environment
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
print(json.dumps(environment("cuda"), indent=1))'
}

# setup.py goes on where there is no compiler; here nothing would be measured without it.
stage_build() {
    "$python" setup.py build_ext --inplace &&
        "$python" setup.py build_cuda_images --editable-mode &&
        "$python" -P -c 'import vitrail._C; print(vitrail._C.version(), vitrail._C.driver().devices)'
}

stage_precompile() { "$python" benchmarks/precompile.py; }

# -P keeps this folder out of sys.path, where transformers would take kernels/ for a package.
stage_tests() {
    "$python" -P -m pytest -m gpu -q -ra --durations=5 --ignore=tests/gpu/test_native.py \
        tests/gpu tests/test_tune.py
}

stage_native() { "$python" -P -m pytest -m gpu -q -ra --durations=5 tests/gpu/test_native.py; }

# Every kernel at small sizes, launched from C++, in turn and overlapped. Without torch's cache every
# tensor is an allocation of its own, whose end the tool knows. What passed is not run again.
stage_sanitizer() {
    command -v compute-sanitizer || { echo 'NOT RUN: no compute-sanitizer here'; return $NOT_RUN; }
    local tool overlap name code status=0
    for tool in memcheck racecheck; do
        for overlap in 0 1; do
            name=$tool-overlap$overlap
            [ ! -e "$state/$name.ok" ] || continue
            echo "---- $name"
            VITRAIL_OVERLAP=$overlap VITRAIL_GPU_TESTS_RUNNER=native \
                PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
                --error-exitcode 9 "$python" -P -m pytest -m gpu -q tests/gpu/test_small.py 2>&1 |
                tee "$state/$name.txt"
            code=${PIPESTATUS[0]}
            if grep -q 'Device not supported' "$state/$name.txt"; then
                echo "NOT RUN: compute-sanitizer does not support this device"
                return $NOT_RUN
            fi
            if [ "$code" = 0 ]; then touch "$state/$name.ok"; else status=1; fi
        done
    done
    return $status
}

suite() {
    local seconds=$(($2 - 60)) # what starts and ends a process comes on top
    "$python" "benchmarks/$1.py" --resume --seconds $seconds ${ALLOW_DIRTY:+--allow-dirty}
}

stage_host() { suite host "$1"; }
stage_latency() { suite latency "$1"; }
stage_ceilings() { suite ceilings "$1"; }
stage_kernels() { suite operators "$1"; }
stage_models() { suite models "$1"; }

# ---- what runs them

# What a stamp stands for: these files on this GPU.
identity() {
    {
        find engine kernels csrc benchmarks tests setup.py pyproject.toml -type f \
            -not -path 'benchmarks/results/*' -not -name '*.so' -not -name '*.pyc' -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum
        nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1
    } | sha256sum | cut -c1-16
}

note() { printf '%-12s %s\n' "$1" "$2" >>"$state/stages.txt"; }

# Of $2 seconds, what stage $1 may take, so that those after it have theirs.
share_of() {
    local name sum=0 mine=${MINUTES[$1]:-} share=$2
    if [ -n "$mine" ]; then
        for name in ${wanted#"${wanted%%"$1"*}"}; do
            [ -e "$state/$name.ok" ] || sum=$((sum + ${MINUTES[$name]:-0}))
        done
        share=$(($2 * mine / sum))
        [ $share -ge $SHORTEST ] || share=$(($2 < SHORTEST ? $2 : SHORTEST))
    fi
    echo $share
}

run() {
    local name=$1 start=$SECONDS limit=$STAGE_LIMIT code
    if [ -e "$state/$name.ok" ]; then
        note "$name" "ok, earlier ($(cat "$state/$name.ok") s)"
        return
    fi
    if [ -n "${LIMIT:-}" ]; then
        local share
        share=$(share_of "$name" $((LIMIT - SECONDS - 15)))
        if [ "$share" -lt $SHORTEST ]; then
            note "$name" 'not started: LIMIT is near; call again'
            return 1
        fi
        [ "$share" -gt "$limit" ] || limit=$share
    fi
    printf '\n######## %s\n' "$name"
    timeout --kill-after=5 "$limit" bash benchmarks/gpu.sh --stage "$name" "$limit" "$state" 2>&1 |
        tee "$state/$name.log"
    code=${PIPESTATUS[0]}
    local took=$((SECONDS - start))
    case $code in
    0)
        echo $took >"$state/$name.ok"
        note "$name" "ok, $took s"
        ;;
    "$NOT_RUN") note "$name" "$(grep -h 'NOT RUN' "$state/$name.log" | tail -n 1)" && return 0 ;;
    "$UNFINISHED") note "$name" "unfinished after $took s: call again" ;;
    124 | 137) note "$name" "TIMED OUT after $took s" ;;
    *) note "$name" "FAILED with $code after $took s" ;;
    esac
    return $((code != 0))
}

# Results, logs and the table, of this call and of earlier ones with the same files.
collect() {
    local name
    mkdir -p "$out" "$state/results"
    cp -R "$state/results/." "$out"
    for name in $ALL; do
        [ ! -e "$state/$name.log" ] || { printf '######## %s\n' "$name" && cat "$state/$name.log"; }
    done >"$out/gpu.log"
    "$python" benchmarks/report.py "$state/stages.txt" | tee "$out/gpu-table.txt"
}

main() {
    local name failed=0 wanted=${STAGES:-$ALL}
    for name in $wanted; do
        [[ " $ALL " == *" $name "* ]] || { echo "stage '$name': wanted some of: $ALL" >&2; exit 2; }
    done
    state=build/gpu/$(identity)
    [ -z "${FRESH:-}" ] || rm -rf "$state"
    mkdir -p "$state"
    : >"$state/stages.txt"
    export VITRAIL_RESULTS=$state/results
    for name in $wanted; do
        if [ $failed != 0 ] && [ "$wanted" != "${wanted#*env}" ] && [ ! -e "$state/env.ok" ]; then
            note "$name" 'not started: env failed'
        else
            run "$name" || failed=1
        fi
    done
    printf '\n'
    collect || failed=1
    exit $failed
}

if [ "${1:-}" = --stage ]; then
    state=$4
    "stage_$2" "$3"
else
    main
fi

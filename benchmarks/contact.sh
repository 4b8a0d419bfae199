#!/usr/bin/env bash
# First contact with a GPU that can be had for minutes, in one prepared call. No GPU has run it yet.
#
#   PYTHON=python3.12 bash benchmarks/contact.sh pack    without a GPU, in the Python, torch and triton
#       of that machine: the extension, the CUDA images, and every kernel of the call, compiled for an
#       H100, into build/contact/ (12 MB; all in four minutes on two cores). Take along build/contact,
#       engine/vitrail/_C.*.so and kernels/vitrail_kernels/images.
#   OUT=folder bash benchmarks/contact.sh run            there: steps from the safest to the longest,
#       a line as each ends (smoke.py); outputs of small launches for the emulator to be compared with;
#       ncu's sections of eight kernels; the GPU tests of small models. SECONDS_EACH='190 40 60 70' are
#       their limits.
#
# Triton's cache keeps absolute paths, so that both sides have it in one folder.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} out=${OUT:-build/contact/out} kept=build/contact
export TRITON_CACHE_DIR=/var/tmp/vitrail-triton PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHONPATH=$PWD/engine:$PWD/kernels:$PWD/tests
PATH=$PATH:/usr/local/cuda/bin
profiled=("launch B/16 x 64 qkv" "launch B/16 x 64 attention" "launch B/16 x 64 out"
    "launch B/16 x 64 up" "launch B/16 x 64 down" "launch B/16 x 64 patch_embed uint8"
    "launch B/16 x 64 attention_one" "launch B/16 x 1 down")

pack() {
    rm -rf "$TRITON_CACHE_DIR" && mkdir -p "$kept" &&
        "$python" setup.py build_ext --inplace &&
        "$python" setup.py build_cuda_images --editable-mode &&
        "$python" benchmarks/smoke.py --compile &&
        "$python" benchmarks/precompile.py --arch 90 --sms 132 | tail -n 1 &&
        "$python" -P -m gpu.record --compile &&
        "$python" -P -m gpu.precompile 90 132 test_small &&
        tar -cJf "$kept/cache.tar.xz" -C "$(dirname "$TRITON_CACHE_DIR")" \
            "$(basename "$TRITON_CACHE_DIR")" &&
        git describe --always --dirty --abbrev=40 --exclude='*' >"$kept/commit"
}

unpack() {
    [ ! -e "$kept/cache.tar.xz" ] || "$python" -c "import tarfile
tarfile.open('$kept/cache.tar.xz').extractall('$(dirname "$TRITON_CACHE_DIR")', filter='data')"
    "$python" -c 'import vitrail._C' || "$python" setup.py build_ext --inplace >"$out/build.txt" 2>&1
}

run() {
    local limits=(${SECONDS_EACH:-190 40 60 70})
    mkdir -p "$out" && unpack
    cp "$kept/commit" "$out/commit.txt"
    "$python" benchmarks/smoke.py --seconds "${limits[0]}" 2>&1 | tee "$out/smoke.txt" | grep -v '^  '
    timeout --signal=INT --kill-after=5 "${limits[1]}" "$python" -P -m gpu.record \
        "$out/recorded.safetensors" 2>&1 | tail -n 20
    profile "${limits[2]}"
    timeout --signal=INT --kill-after=10 "${limits[3]}" "$python" -P -m pytest -m gpu -q -x \
        --tb=short -p no:cacheprovider tests/gpu/test_small.py 2>&1 |
        tee "$out/small.txt" | tail -n 25
}

profile() {
    local report=$kept/ncu.ncu-rep sections=()
    for name in SpeedOfLight MemoryWorkloadAnalysis ComputeWorkloadAnalysis WarpStateStats \
        SchedulerStats Occupancy LaunchStats SourceCounters; do
        sections+=(--section "$name")
    done
    command -v ncu || { echo 'NOT RUN: no ncu here'; return; }
    timeout "$1" ncu --clock-control none "${sections[@]}" -f -o "${report%.ncu-rep}" \
        -k 'regex:^_(linear|attention|patch|layernorm|pool)' \
        "$python" benchmarks/smoke.py --step "${profiled[@]}" 2>&1 | tail -n 3
    [ -e "$report" ] || return
    ncu --import "$report" --page details --csv >"$out/details.csv"
    ncu --import "$report" --page source --csv --print-source sass | gzip >"$out/source.csv.gz"
}

case ${1:-} in
pack | run) "$1" ;;
*) sed -n '2,/^set/p' "$0" | sed '$d' && exit 2 ;;
esac

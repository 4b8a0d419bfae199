#!/usr/bin/env bash
# Tests and benchmarks on a GPU that is available for minutes only; downloads nothing.
#
#   gpu.sh pack      without a GPU, with the Python, torch and triton of the GPU machine: writes the
#                    extension, CUDA binaries, kernels for an H100, Triton's launchers and the commit
#                    into build/pack, which is copied to that machine (five CPU minutes)
#   gpu.sh first     hangs, wrong results, and the speed of each kernel and model
#   gpu.sh second    with the fastest tiles: models against torch.compile, latency, the native
#                    runner's bits
#   gpu.sh STEP...   these steps of calls.py; without an argument all of them: `make gpu`
#
# Settings, from the environment:
#
#   LIMIT=seconds        of the whole call, which the steps share (default: 9 minutes for each step)
#   OUT=folder           of gpu.log, gpu-table.txt, sm_90.json and <gpu>/<suite>.json (default:
#                        benchmarks/results)
#   FRESH=1              forget earlier calls. Otherwise, while the sources are unchanged, a step that
#                        passed is not run again and a suite continues with its next case
#   ALLOW_DIRTY=1        measure a tree with uncommitted changes
#   VITRAIL_COMMIT=hash  the commit of a copy that has neither git nor build/pack
#   PYTHON=program       the Python that has torch (default: python3)
#
# Exit code: 0; 1 if a step failed or is not finished; 2 for an unknown step.
set -u
cd "$(dirname "$0")/.." || exit
PATH=$PATH:/usr/local/cuda/bin
export PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# without the root: transformers would import the folder kernels/ as a package
export PYTHONPATH=$PWD/engine:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" benchmarks/calls.py "$@"

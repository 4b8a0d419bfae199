#!/usr/bin/env bash
# Tests and benchmarks on a GPU that may be had for minutes only; nothing is downloaded.
#
#   gpu.sh pack      without a GPU, in the Python, torch and triton of the machine that has one: the
#                    extension, CUDA binaries, kernels for an H100, Triton's launchers and the commit,
#                    into build/pack, to be taken along (five CPU minutes)
#   gpu.sh first     what hangs, what is wrong, how fast is each kernel and model
#   gpu.sh second    with the tiles that won: models against torch.compile, latency, the native
#                    runner's bits
#   gpu.sh STEP...   some of the steps in calls.py; without a word all of them: `make gpu`
#
# Settings, from the environment:
#
#   LIMIT=seconds        the call ends by then, and steps share it; else each has 9 minutes
#   OUT=folder           takes gpu.log, gpu-table.txt, sm_90.json and <gpu>/<suite>.json, else
#                        benchmarks/results
#   FRESH=1              forget earlier calls. Else, while the sources stay as they are, a step that
#                        passed is not run again and a suite goes on with its next case
#   ALLOW_DIRTY=1        measure a tree with uncommitted changes
#   VITRAIL_COMMIT=hash  whose files these are, in a copy without git and without build/pack
#   PYTHON=program       the Python that has torch, else python3
#
# Exit code 0; 1 if a step failed or is not finished; 2 for a word that is no step.
set -u
cd "$(dirname "$0")/.." || exit
PATH=$PATH:/usr/local/cuda/bin
export PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# no root among these: transformers would take the folder kernels/ for a package
export PYTHONPATH=$PWD/engine:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" benchmarks/calls.py "$@"

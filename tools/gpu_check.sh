#!/usr/bin/env bash
# Everything that needs a GPU, in one command, for a machine that has one:
#   builds vis._C for the GPUs that are visible, runs the tests marked `gpu`, and measures deformable attention at 384x640
#   and 736x1280, batch 1, 2 and 8, float32 and bfloat16, forward and forward + backward, against PyTorch, the package
#   deformops where it is installed, and what memory, L1 and arithmetic need at least.
#
#   tools/gpu_check.sh [--dry-run] [--out FOLDER]
#
# --dry-run goes through the same steps without a GPU: the CPU library in a folder of its own, tests skipped, tiny sizes.
# FOLDER (default output/gpu_check) gets op.json, op.txt, tests.txt and build.txt. Status 1 if a step failed; all run.
set -u
cd "$(dirname "$0")/.." || exit 1

dry=0
out=output/gpu_check
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1 ;;
        --out)
            [ $# -gt 1 ] || { echo "--out needs a folder" >&2; exit 2; }
            out=$2
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        *)
            echo "unknown argument $1; see $0 --help" >&2
            exit 2
            ;;
    esac
    shift
done

if [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # this checkout, whatever is installed
mkdir -p "$out" || exit 1
failed=()

step() { # name, file for its output, command
    local name=$1 log=$2
    shift 2
    echo
    echo "==== $name: $*"
    if "$@" 2>&1 </dev/null | tee "$out/$log"; [ "${PIPESTATUS[0]}" -eq 0 ]; then
        echo "==== $name: ok"
    else
        echo "==== $name: FAILED"
        failed+=("$name")
    fi
}

gpus() {
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv
    "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.__version__, torch.cuda.get_device_name())'
}

build() { # vis/_C.so for the visible GPUs; in a dry run for the CPU, elsewhere
    if [ $dry -eq 1 ]; then
        VIS_BUILD_CUDA=0 "$python" setup.py build_ext --build-lib "$out/lib" --build-temp "$out/tmp"
        return
    fi
    VIS_BUILD_CUDA=1 "$python" setup.py build_ext --inplace --build-temp "$out/tmp"
}

device=cuda
more=()
if [ $dry -eq 1 ]; then
    device=cpu
    more=(--warmup 0 --repeats 1)
else
    step gpus gpus.txt gpus
fi
step build build.txt build
step tests tests.txt "$python" -m pytest -m gpu -p no:cacheprovider tests
step op op.txt "$python" tools/benchmark.py op-device --device $device --json "$out/op.json" ${more[@]+"${more[@]}"}

echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "all steps passed; results in $out"

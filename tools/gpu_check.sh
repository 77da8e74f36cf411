#!/usr/bin/env bash
# Everything that needs a GPU, in one command, for a machine that has one. It goes on after a step that failed.
#
#   tools/gpu_check.sh [--dry-run] [--out FOLDER] [--part PART]...
#
# Parts, in the order they run (default: all of them; minutes on an H200 are what their steps may take at most):
#   build      vis._C for the GPUs that are visible                                                             (9)
#   tests      the tests marked `gpu`: kernels, half precision and evaluation of every method                   (9)
#   op         deformable attention at 384x640 and 736x1280, batch 1, 2 and 8, float32 and bfloat16, forward and
#              forward + backward, against PyTorch, the package deformops where it is installed, and what memory, L1
#              and arithmetic need at least                                                                     (5)
#   train      whole iterations of MinVIS, IDOL and IAI (R50) in float32, float16, bfloat16, with activations computed
#              again; and three iterations of the demo under torchrun with NCCL                                 (9)
#   compile    the same with a backbone that torch compiles                                                     (9)
#   inference  seconds per frame of the three, in pictures of 360 rows; memory at 30 and at 300 frames          (9)
# Each part stays under ten minutes, for machines that end longer commands; `--part` may be given several times.
#
# --dry-run goes through the same steps without a GPU: the library as it is, or where there is none that for CPUs in a
# folder of its own; gpu tests skipped, the tiny models of the demonstrations, gloo for NCCL, and each
# step may take four times as long. FOLDER (default output/gpu_check) gets PART.txt, all
# that was printed, and PART.json, the figures; summary.txt has the steps and the figures of all parts so far.
# Status 1 if a step failed, 2 for a wrong command line.
set -u
cd "$(dirname "$0")/.." || exit 1

all=(build tests op train compile inference)
dry=0
out=output/gpu_check
parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1 ;;
        --out | --part)
            [ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
            if [ "$1" = --out ]; then
                out=$2
            elif [[ " ${all[*]} " == *" $2 "* ]]; then
                parts+=("$2")
            else
                echo "unknown part $2; there are ${all[*]}" >&2
                exit 2
            fi
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
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")

if [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 # this checkout, whatever is installed
mkdir -p "$out" || exit 1
scratch=$(mktemp -d) || exit 1 # so that few files are left in FOLDER
trap 'rm -rf "$scratch"' EXIT
failed=()

step() { # name, seconds it may take, command; its output goes to PART.txt too
    local name=$1 limit=$2 start=$SECONDS word status
    shift 2
    [ $dry -eq 0 ] || limit=$((4 * limit)) # a busy machine without a GPU
    echo
    echo "==== $part: $name: $*"
    timeout -k 5 "$limit" "$@" 2>&1 </dev/null | tee "$scratch/step.txt"
    status=${PIPESTATUS[0]}
    word=ok
    [ "$status" -eq 0 ] || word="FAILED (status $status)"
    [ "$status" -ne 124 ] || word="FAILED (longer than $limit s)"
    [ "$status" -eq 0 ] || failed+=("$part: $name")
    echo "==== $part: $name: $word, $((SECONDS - start)) s"
    { echo "==== $name: $*"; cat "$scratch/step.txt"; } >>"$out/$part.txt"
    { echo "$part: $name: $word, $((SECONDS - start)) s"; tail -n 12 "$scratch/step.txt" | cut -c 1-240 | sed 's/^/    /'; } \
        >>"$out/summary.txt"
}

benchmark() { # name, seconds, arguments of tools/benchmark.py
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" -W ignore tools/benchmark.py "$1" --device $device --json "$scratch/$part.$name.json" "${@:2}"
}

gather() { # the json files of a part in one
    "$python" - "$scratch" "$part" "$out/$part.json" <<'PYTHON'
import json, pathlib, sys
folder, part, result = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
found = {path.name[len(part) + 1 : -5]: json.loads(path.read_text()) for path in sorted(folder.glob(f"{part}.*.json"))}
if found:
    result.write_text(json.dumps(found, indent=1) + "\n")
PYTHON
}

methods=(minvis idol iai)
if [ $dry -eq 1 ]; then
    device=cpu
    backend=gloo
    eager=(SOLVER.COMPILE.BACKEND eager)
    few=(--warmup 0 --repeats 1)
    size=(--input-size 64x96)
    variants=(fp16 bf16)
    long=(--frames 2 4)
    export OMP_NUM_THREADS=1
else
    device=cuda
    backend=nccl
    eager=()
    few=(--warmup 3 --repeats 10)
    size=(--input-size 360x640)
    variants=(plain fp16 bf16 checkpoint)
    long=()
fi
config() { # of a method
    if [ $dry -eq 1 ]; then echo "configs/demo/$1_synthetic.yaml"; else echo "configs/$1/ytvis19_r50.yaml"; fi
}

run_build() {
    if [ $dry -eq 1 ] && [ -f vis/_C.so ]; then # compiling takes minutes where others compute
        step library 60 "$python" -W ignore -c 'import torch; torch.ops.load_library("vis/_C.so")'
        return
    fi
    if [ $dry -eq 1 ]; then
        VIS_BUILD_CUDA=0 step cpu 480 "$python" setup.py -q build_ext --build-lib "$scratch/lib" --build-temp "$scratch/tmp"
        return
    fi
    step gpus 60 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv
    step torch 60 "$python" -c \
        'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.__version__, torch.cuda.get_device_name())'
    VIS_BUILD_CUDA=1 step cuda 440 "$python" setup.py build_ext --inplace --build-temp "$scratch/tmp"
}

run_tests() {
    step gpu 540 "$python" -W ignore -m pytest -q -m gpu -p no:cacheprovider -rfE tests
}

run_op() {
    if [ $dry -eq 1 ]; then benchmark op 300 op-device "${few[@]}"; else benchmark op 300 op-device; fi
}

run_train() {
    local method
    for method in "${methods[@]}"; do
        # one variant is enough to see that the others would be built
        [ $dry -eq 0 ] || [ "$method" = minvis ] || variants=(bf16)
        benchmark "$method" 140 train --config-file "$(config "$method")" --frames 2 "${size[@]}" "${few[@]}" \
            --variants "${variants[@]}"
    done
    VIS_CHECK_ROOT=$scratch/data step data 50 "$python" -W ignore -c \
        'import os; from vis.data.synthetic import generate; generate("synthetic_ytvis", os.environ["VIS_CHECK_ROOT"], num_videos={"train": 8, "val": 1})'
    DETECTRON2_DATASETS=$scratch/data step "$backend" 80 "$python" -W ignore -m torch.distributed.run --standalone \
        --nproc-per-node 1 tools/train_net.py --config-file configs/demo/minvis_synthetic.yaml MODEL.DEVICE $device \
        SOLVER.MAX_ITER 3 TEST.EVAL_PERIOD 0 DATASETS.TEST "()" OUTPUT_DIR "$scratch/train"
}

run_compile() {
    local method of=("${methods[@]}")
    [ $dry -eq 0 ] || of=(minvis)
    for method in "${of[@]}"; do
        benchmark "$method" 170 train --config-file "$(config "$method")" --frames 2 "${size[@]}" "${few[@]}" \
            --variants compile ${eager[@]+--opts "${eager[@]}"}
    done
}

run_inference() {
    local method of=("${methods[@]}")
    [ $dry -eq 0 ] || of=(minvis)
    for method in "${of[@]}"; do
        benchmark "$method" 90 inference --config-file "$(config "$method")" "${size[@]}" "${few[@]}" ${long[@]+--frames 2}
        benchmark "${method}_memory" 90 memory --config-file "$(config "$method")" "${size[@]}" "${long[@]}"
    done
}

: >>"$out/summary.txt"
for part in "${parts[@]}"; do
    : >"$out/$part.txt"
    "run_$part"
    gather
done

echo
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all steps passed; results in $out"

#!/usr/bin/env bash
# What a GPU machine without a network can say about this package, in one command of at most 8 minutes.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/gpu_check.sh [--wheels FOLDER] [--out FOLDER]

Runs, on a machine with a GPU and no network: every test that needs a GPU, the step benchmark on the GPU beside its peers
(flashoptim's FlashLion, bitsandbytes' Lion, Transformer Engine's FusedAdam where they are installed), and a short bf16
pretraining of a tiny GPT in Megatron. Leaves gpu_check.json and gpu_check.md in --out (runs/gpu_check).

The environment's Python is $PYTHON (default: python3). It needs torch with CUDA and megatron-core. What else is wanted is
taken from --wheels, which is made beforehand on a machine with a network and the same Python and platform:

    pip download -d wheels -c launch/constraints.txt '.[train,tools,test]'
    pip download -d wheels --no-deps -r tools/benchmark/peers.txt flashoptim==0.1.4
TEXT
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}" WHEELS="" OUT="$ROOT/runs/gpu_check"
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --wheels) WHEELS="$(cd "${2:?--wheels needs a folder}" && pwd)"; shift 2 ;;
        --out) OUT="${2:?--out needs a folder}"; shift 2 ;;
        *) echo "gpu_check: $1 is unknown; see --help" >&2; exit 2 ;;
    esac
done

if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "gpu_check: $PYTHON finds no torch with a GPU here (torch.cuda.is_available() is false). Nothing was done" >&2
    exit 1
fi

mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" "${ROOT}[train,tools,test]"
    # Peers are optional: one that is not among the wheels is named in the table.
    for peer in $(sed 's/ *#.*//' "$ROOT/tools/benchmark/peers.txt") flashoptim==0.1.4; do
        "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$peer" || true
    done
fi
cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
unset MEGATRON_LION_DEVICE

# Each part is cut off at its own limit, and its output kept whatever becomes of it: 8 minutes in all.
declare -A STATUS
part() {
    local name="$1" seconds="$2"
    shift 2
    echo "== $name"
    STATUS[$name]=0
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1 || STATUS[$name]=$?
    tail -n 3 "$OUT/$name.log"
}
part tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_triton.py
part benchmark 180 "$PYTHON" -m tools.benchmark.step --device cuda --peers all --json "$OUT/step.json" --plot "$OUT/step.svg"
part text 30 "$PYTHON" tools/demo_text.py --output "$OUT/text"
text() { echo "$OUT/text/$1_text_document"; }
part megatron 110 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 launch/pretrain_gpt.py \
    --optimizer lion --lr 1e-4 --weight-decay 0.1 --bf16 --use-distributed-optimizer --lion-kernel fused \
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters 20 --log-interval 5 --eval-iters 0 --transformer-impl local \
    --no-gradient-accumulation-fusion --no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUT/text/tokenizer.model" --num-workers 0 \
    --train-data-path "$(text train)" --valid-data-path "$(text valid)" --test-data-path "$(text test)"

failed=0
{
    echo "# GPU check"
    echo
    "$PYTHON" -c "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'CUDA', torch.version.cuda)"
    for name in tests benchmark text megatron; do
        printf '\n## %s: exit status %s\n\n' "$name" "${STATUS[$name]}"
        if [ "$name" = benchmark ]; then cat "$OUT/$name.log"; else tail -n 25 "$OUT/$name.log" | sed 's/^/    /'; fi
    done
} >"$OUT/gpu_check.md"
for name in "${!STATUS[@]}"; do
    [ "${STATUS[$name]}" = 0 ] || failed=1
done
"$PYTHON" - "$OUT" "${STATUS[tests]}" "${STATUS[benchmark]}" "${STATUS[text]}" "${STATUS[megatron]}" <<'PY'
import json
import sys
from pathlib import Path

out, statuses = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
record = {"exit_status": dict(zip(("tests", "benchmark", "text", "megatron"), statuses, strict=True))}
if (out / "step.json").is_file():
    record["step"] = json.loads((out / "step.json").read_text())
(out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
PY
echo "== $OUT/gpu_check.md, $OUT/gpu_check.json"
exit "$failed"

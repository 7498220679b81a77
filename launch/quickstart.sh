#!/usr/bin/env bash
# From nothing to a trained, evaluated, exported and fine-tuned dual encoder, on a machine with Python 3.11 or newer.
# Started again, it goes on where it stopped and skips what is done. Everything it makes lies in .venv, data and runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment
export HF_HUB_OFFLINE=1

scenes=data/scenes shards=data/scenes/shards run=runs/quickstart finetuned=runs/finetune_scenes
results=$run/results.jsonl

step() { printf '\n== %s\n' "$*"; }

pack() {
    python -m data_tools pack "$1" "$shards/$2" "${@:3}"
}

# One rank per GPU (a power of two, which divides every batch here), or two on the cores of the CPU; a free port.
start_ranks() {
    local ranks port
    read -r ranks port < <(python -c 'import os, socket, torch
count = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
probe = socket.create_server(("127.0.0.1", 0))
print(1 << (count.bit_length() - 1), probe.getsockname()[1])')
    deepspeed --num_accelerators "$ranks" --master_port "$port" "$@"
}

evaluate() {
    python launch/evaluate.py --model "$run" --output "$results" --skip-existing "$@"
}

step "1/7 drawing captioned scenes"
python -m data_tools scenes "$scenes"

step "2/7 packing them into shards"
for split in train test minimal_pairs; do
    pack "$scenes/$split/captions.jsonl" "$split"
done
for split in train test; do
    pack "$scenes/classes/$split" "classes_$split" --labels folder
done
python -m data_tools preview "$shards/train" "$scenes/preview.png"

step "3/7 training the two towers"
start_ranks launch/pretrain.py --config configs/quickstart.yaml "run.dir=$run"

step "4/7 evaluating on scenes that training never showed"
evaluate --task retrieval --data "$shards/test" --picture "$run/retrieval.png"
evaluate --task pairs --data "$shards/minimal_pairs"
evaluate --task classification --data "$shards/classes_test" --templates configs/templates/scenes.txt

step "5/7 exporting for open_clip and transformers"
if [[ -d $run/export ]]; then
    echo "$run/export is there already"
else
    python launch/export.py "$run" "$run/export"
fi

step "6/7 fine-tuning the image tower as a classifier"
start_ranks launch/finetune.py --config configs/finetune/scenes.yaml "init=$run" "run.dir=$finetuned"

step "7/7 what came out"
python -m pretrain.evaluate.summary --results "$results" --finetuned "$finetuned" \
    --shortcuts "$scenes/test/shortcuts.json" \
    --made "run folder=$run" "TensorBoard log=$run/tensorboard" "results=$results" "export=$run/export" \
    "fine-tuned classifier=$finetuned" "picture of the corpus=$scenes/preview.png" \
    "picture of some retrievals=$run/retrieval.png"

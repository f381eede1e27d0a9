#!/usr/bin/env bash
# Continues the pretraining of a GPT-NeoX (Pythia) on long text, all weights, every sequence on two GPUs under ZeRO-3:
#     bash examples/continue_gpt_neox.sh path/to/pythia books.jsonl --seq_len 65536 --output_dir outputs/neox
exec accelerate launch --config_file "${CONFIG:-accelerate_configs/fpdt_zero3_2gpu.yaml}" \
    examples/finetune_long_context.py --model_name_or_path "$1" --train_file "$2" "${@:3}"

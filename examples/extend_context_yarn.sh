#!/usr/bin/env bash
# Trains a checkpoint, made for ORIGINAL tokens, on sequences FACTOR times as long, with YaRN, all weights, on one GPU:
#     bash examples/extend_context_yarn.sh path/to/checkpoint books.jsonl FACTOR ORIGINAL --output_dir outputs/longer
# The configuration of the saved model has the new length and the rotary embeddings that belong to it.
ROPE="{\"rope_type\": \"yarn\", \"factor\": $3.0, \"original_max_position_embeddings\": $4}"
exec accelerate launch --config_file "${CONFIG:-accelerate_configs/fpdt_single_gpu.yaml}" \
    examples/finetune_long_context.py --model_name_or_path "$1" --train_file "$2" --seq_len "$(($3 * $4))" \
    --config_overrides "{\"max_position_embeddings\": $(($3 * $4)), \"rope_parameters\": $ROPE}" "${@:5}"

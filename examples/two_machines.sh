#!/usr/bin/env bash
# A script of yours on two machines of eight GPUs, every sequence on all 16. To be started on both, from the same checkout with the
# same files; ADDRESS is that of the first machine as the second sees it:
#     bash examples/two_machines.sh 0 ADDRESS train.py ...    # on the first
#     bash examples/two_machines.sh 1 ADDRESS train.py ...    # on the second
exec accelerate launch --config_file "${CONFIG:-accelerate_configs/fpdt_zero3_16gpu_2nodes.yaml}" \
    --machine_rank "$1" --main_process_ip "$2" -m hf_fpdt.run "${@:3}"

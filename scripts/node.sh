#!/bin/bash
# One machine of several, each started with the same words but for NODE: docs/scaling.md, "Several machines".
#   NODE=0 MACHINES=2 HOST=first bash scripts/node.sh --config wan-1.3b bidirectional forward
# NODE: 0 on the machine HOST, then 1, 2, ... FILE: the launch file. GPUS: of each machine. PORT: a free one of HOST.
set -e
cd "$(dirname "$0")/.."
exec accelerate launch --config_file "${FILE:-scripts/accelerate/eight_gpus_ddp.yaml}" --num_machines "$MACHINES" \
    --num_processes "$((MACHINES * ${GPUS:-8}))" --machine_rank "$NODE" --main_process_ip "$HOST" \
    --main_process_port "${PORT:-29500}" scripts/distill.py "$@"

#!/bin/bash
# Slurm, in the clone: sbatch scripts/slurm.sh --config wan-1.3b bidirectional forward
# Jobs of four hours, one after another: each ends saved (--minutes), the next resumes. Once the run is finished, what
# is left of the array ends at once, with one line.
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --time=04:00:00
#SBATCH --array=1-12%1
. .venv/bin/activate
export MACHINES=$SLURM_NNODES
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HOST
srun bash -c 'NODE=$SLURM_NODEID exec bash scripts/node.sh "$@"' node "$@" --minutes 230

#!/bin/bash
# Convert a model, uptrain it on several machines, evaluate and report, under Slurm:
#
#     RECIPE=recipe.yaml OUT=runs/mine sbatch examples/several-machines/slurm.sh
#
# OUT, the model, the text and this environment lie on a file system that all machines share. Submit the same line again
# to resume. Ten minutes before the time is up, Slurm asks to stop, and a checkpoint is saved.
#SBATCH --job-name=cla-convert
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
set -euo pipefail

RECIPE=${RECIPE:-recipe.yaml}
OUT=${OUT:-runs/mine}
GPUS=${GPUS:-8}
export CLA_CONVERT_CACHE=${CLA_CONVERT_CACHE:-$PWD/cla-cache}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=500 # seconds that saving may take

srun --nodes=1 --ntasks=1 cla-convert run "$RECIPE" --out "$OUT" --until convert

if [ ! -e "$OUT/train.json" ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # which reads all: head would end the pipe early
    srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS" --max-restarts 3 \
        --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
        -m cla_convert uptrain "$OUT/converted" "$OUT/uptrained" --recipe "$OUT/recipe.yaml" \
        --set train.shard_degree=node
fi

srun --nodes=1 --ntasks=1 cla-convert run "$RECIPE" --out "$OUT"

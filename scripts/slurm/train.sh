# What the training jobs share: one process per GPU, a job that is cut short goes back into the queue.
# Sourced by the .sbatch files in the repository's root, with CONFIG.yaml [section.key=value ...] as arguments.
set -euo pipefail
source .venv/bin/activate

# Nothing here needs the internet once the data is prepared; see docs/training.md.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes%%$'\n'*}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE="$SLURM_NTASKS"

# If a process ends badly, the others end too instead of waiting for it.
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train.py --config "$@"' train "$@"

# train.py ends well either when the model is there or after a signal, with a checkpoint to go on from.
run=$(WORLD_SIZE=1 python train.py --config "$@" --dry-run | sed -n 's/^output_dir: //p')
if [ ! -d "$run/final" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi

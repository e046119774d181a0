#!/bin/bash
# Trains on 2 machines of 8 GPUs: DATA=/data/coco BACKBONE=resnet50.pth sbatch examples/cluster/slurm.sh
# (on one: sbatch --nodes=1 ...)
# A job that is preempted, or reaches its time limit, saves itself and goes back into the queue, until it is done.
#SBATCH --job-name=htc-r50
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120

set -euo pipefail

OUTPUT=${OUTPUT:-runs/$SLURM_JOB_NAME}
DATA=${DATA:?the folder in COCO layout}
PRESET=${PRESET:-htc_r50_fpn_1x_coco}
GPUS=${SLURM_GPUS_ON_NODE:-8}

# The first machine is where the processes meet; the port differs between jobs that share a machine.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))

if [ -e "$OUTPUT/config.json" ]; then
    options=(--resume)
else
    options=(--preset "$PRESET" --data "$DATA" --backbone-weights "${BACKBONE:?ImageNet weights}" --workers 6)
fi

# Slurm sends USR1 to this script 120 s before the end, and TERM when it preempts the job. SIGTERM to torchrun reaches
# every rank; they finish the step and save it.
stopped=''
step=''
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || [ -z "$step" ] || kill -TERM "$step"' USR1 TERM

# One torchrun a machine. When a process dies it starts all of them again, up to 3 times, from the last checkpoint.
# Since Slurm 22.05 srun does not take the number of cores from the job by itself.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$GPUS" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$host:$port" \
    --log-dir="logs/$SLURM_JOB_NAME-$SLURM_JOB_ID" --redirects=3 --tee=0:3 \
    -m cascadeops.models.train "${options[@]}" --output "$OUTPUT" &
step=$!

code=0
wait "$step" || code=$?
if [ -n "$stopped" ]; then
    code=0
    wait "$step" || code=$? # the first wait was ended by the signal
    [ "$code" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"

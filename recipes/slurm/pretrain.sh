#!/bin/bash
# Pretraining on Slurm that goes on by itself until it is done: after the time limit, a preemption, a lost node.
#
#   mlm recipe show slurm/pretrain.sh > pretrain.sh      # then set the lines below to what the cluster has
#   sbatch --nodes 4 pretrain.sh gpt/8.3b tokenizer=tok data.path=data/corpus parallel.tensor=8 --output runs/gpt
#
# All words go to `mlm pretrain`. Give --output: a job that starts again goes on from the newest checkpoint in it.
#SBATCH --job-name=mlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# One task is one rank: `mlm` reads rank, sizes and the first node from srun, and saves before the job's time is over.
# A rank that is lost is noticed by the others, which end with code 6; --wait is for those that cannot even do that.
srun --kill-on-bad-exit=0 --wait=300 mlm pretrain "$@"
code=$?

# 75: stopped with a good checkpoint (time limit, preemption). 6, or killed by a signal: a rank was lost or hung; that may
# be the machine's fault, but not for ever. All else (a wrong recipe, bad data, NaN, Ctrl-C) would happen again.
losses=${SLURM_SUBMIT_DIR:-.}/mlm-$SLURM_JOB_ID.losses
again=0
if [ "$code" -eq 75 ]; then
    again=1
elif [ "$code" -eq 6 ] || { [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; }; then
    [ "$(cat "$losses" 2>/dev/null | wc -l)" -lt "${MLM_MAX_RESTARTS:-10}" ] && again=1
    echo "$(date) exit code $code" >>"$losses"
fi
if [ "$again" -eq 1 ]; then
    echo "exit code $code: to the queue again" >&2
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"

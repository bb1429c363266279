#!/usr/bin/env bash
# A Slurm array of workers: every task is one worker on one GPU, as many at a time as Slurm finds room for.
#
#   yolosearch create my-study.yaml                        # once, on any host that sees the database and the data
#   sbatch --array=0-15 slurm-array.sh my-study            # --array=0-63%16 for at most 16 at a time
#
# A task that comes near its time limit hands its trials back and queues itself again; one that is preempted is queued
# again by Slurm; whichever worker is free continues the trials. A task that finds nothing left to do ends with 0, and
# `scancel` ends one for good.
#
# The database and MLflow are named by the environment, best in a file that only you can read (chmod 600):
#   export YOLOSEARCH_STORAGE_URL=postgresql://studies@db.example/studies PGPASSWORD=...
#   export MLFLOW_TRACKING_URI=http://mlflow.example:5000
#   export YOLOSEARCH_RUNS_DIR=/shared/runs                # checkpoints that all nodes can see
#   PATH=$HOME/yolosearch/.venv/bin:$PATH
#SBATCH --job-name=yolosearch
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=yolosearch-%A_%a.log
# To this script alone, 120 s before the time is up; not TERM, which is what scancel and preemption send.
#SBATCH --signal=B:USR1@120
set -euo pipefail

study=${1:?usage: sbatch --array=0-15 slurm-array.sh STUDY}
settings=${YOLOSEARCH_ENV_FILE:-$HOME/.config/yolosearch/env}
if [ -r "$settings" ]; then
  # shellcheck source=/dev/null
  . "$settings"
fi
: "${YOLOSEARCH_STORAGE_URL:?is not set: the database of the studies, for example in $settings}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# The array's and the task's number make the name readable; the restart count makes a task that was queued again a new worker.
name=slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}-${SLURM_ARRAY_TASK_ID:-0}-${SLURM_RESTART_COUNT:-0}
requeue=no
yolosearch worker "$study" --worker-id "$name" &
worker=$!
# SIGTERM makes the worker hand its trials back at their last epoch and end.
trap 'requeue=yes; kill -TERM "$worker" 2>/dev/null || true' USR1
trap 'kill -TERM "$worker" 2>/dev/null || true' TERM INT

# A trapped signal ends `wait` early, so it is asked again for as long as the worker lives.
code=0
wait "$worker" || code=$?
while kill -0 "$worker" 2>/dev/null; do
  code=0
  wait "$worker" || code=$?
done

if [ "$requeue" = yes ]; then
  echo "$name: out of time, trials handed back, queued again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"

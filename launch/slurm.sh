#!/bin/bash
# A run of launch/train.py over the hosts of a Slurm job, which is requeued until it is done:
#
#     sbatch --nodes 8 --gpus-per-node 8 launch/slurm.sh --job.config_file run.toml
#
# Submit it from the repository, on a file system that all hosts mount; arguments are those of
# launch/train.py. Options of sbatch on the command line replace those below (partition, account,
# time). docs/several_hosts.md says more.
#
#SBATCH --job-name=lasp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Five minutes before the time is over the ranks are asked to save: longer than a step and a save.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -u
# Ranks per host; starts after which a job that loses hosts again and again is given up.
RANKS_PER_HOST=${RANKS_PER_HOST:-${SLURM_GPUS_ON_NODE:-1}}
MAX_REQUEUES=${MAX_REQUEUES:-20}
PYTHON=${PYTHON:-.venv/bin/python}

# The ranks are asked to save by Slurm; this shell waits for their exit code.
trap : TERM

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a host get ports of their own.
port=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

start() {
    if ! getent hosts "$1" > /dev/null; then
        echo "error: $(hostname) cannot resolve $1, the first host of the job: enter it in DNS or" \
            "/etc/hosts." >&2
        exit 73
    fi
    exec "$PYTHON" launch/torchrun.py --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
        --nproc_per_node "$RANKS_PER_HOST" --master_addr "$1" --master_port "$2" \
        --rdzv_conf timeout=300 launch/train.py "${@:3}"
}
export -f start
export PYTHON RANKS_PER_HOST

# A host whose ranks have ended does not end the others: they say why they end, all within the
# timeouts of the job.
srun --kill-on-bad-exit=0 bash -c 'start "$@"' start "$first" "$port" "$@" &
# A signal ends `wait`, not srun.
while true; do
    wait $!
    code=$?
    kill -0 $! 2> /dev/null || break
done

requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        echo "slurm.sh: $1, but the job was requeued $MAX_REQUEUES times (MAX_REQUEUES): look at" \
            "the hosts that are named above."
        exit "$code"
    fi
    echo "slurm.sh: $1: requeued, it continues from its newest checkpoint."
    exec scontrol requeue "$SLURM_JOB_ID"
}

# srun returns the highest code of all hosts; launch/exit_codes.py and docs/training.md list them.
case $code in
    0) echo "slurm.sh: done." ;;
    75) requeue "stopped after all steps were saved" ;;
    69) requeue "a rank or host died or hung" ;;
    70) echo "slurm.sh: no valid checkpoint, or one of another run (70): not requeued." ;;
    72) echo "slurm.sh: NaN or infinite loss (72): change the config; not requeued." ;;
    73) echo "slurm.sh: config, data or network cannot be trained with (73): not requeued." ;;
    74) echo "slurm.sh: checkpoints cannot be written (74): free disk space; not requeued." ;;
    130 | 143) echo "slurm.sh: stopped without a checkpoint ($code): not requeued." ;;
    *) echo "slurm.sh: failed with code $code, see above: not requeued." ;;
esac
exit "$code"

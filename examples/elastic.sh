#!/bin/bash
# Trains on one to four machines with four GPUs each, which may join and leave. Run the same command on each:
#   examples/elastic.sh FIRST_MACHINE:29400 configs/clip-vit-b.yaml output=runs/clip-vit-b data.train=... data.val=...
# The run folder must be on a disk that all machines share. If FIRST_MACHINE is lost, the job ends.
#
# When a worker dies or hangs (exit code 70) or a machine is lost, torchrun restarts all workers, up to --max-restarts
# times; they continue from the newest checkpoint, so checkpoint.every_steps limits the repeated work. When a machine
# joins, torchrun sends TERM: the ranks save and restart with the new one. Nothing is repeated, and this restart is
# not counted.
#
# optim.batch_size is over all GPUs and must be a multiple of optim.accumulate x GPUs for every possible number of
# GPUs (here 4, 8, 12 and 16, so 768 or 1536, not 1024). The learning rate and the data of each step stay the same.
#
# TERM or USR1 to torchrun on one machine: its workers save and stop; torchrun kills them after 30 s. A signal to a
# worker makes all ranks save and exit with 75, a failure for torchrun, which restarts them while restarts are left.
# torchrun's exit code is then 1. The file "preempted" in the run folder shows that the run can be continued.
endpoint=$1
shift
# Otherwise torchrun 2.11 keeps one store across restarts, in which new ranks find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes=1:4 \
    --nproc-per-node=4 \
    --max-restarts=3 \
    --rdzv-backend=c10d \
    --rdzv-id=fastalign \
    --rdzv-endpoint="$endpoint" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m fastalign.train "$@"

#!/bin/bash
# Trains on one to four machines of four GPUs, which may come and go. The same command on each:
#   examples/elastic.sh FIRST_MACHINE:29400 configs/clip-vit-b.yaml output=runs/clip-vit-b data.train=... data.val=...
# The run folder must lie on a disk that all machines share.
#
# When a worker dies, stops responding (code 70) or a machine disappears, torchrun ends the remaining workers and starts
# all of them again, up to --max-restarts times; they go on from the newest checkpoint, so checkpoint.every_steps
# decides how much is done twice. When a machine joins, torchrun sends TERM: the ranks save at their next step, start
# again with the new one, and nothing is done twice. That does not count as a restart.
#
# optim.batch_size is the batch over all GPUs, and stays what it is with any number of them: the same images, masks and
# learning rate at each step. It must be a multiple of optim.accumulate x GPUs for every number that may come up (here
# 4, 8, 12 and 16, so 768 or 1536, not 1024); otherwise the run ends with a line that says so.
#
# TERM or USR1 to torchrun on one machine ends the workers of that machine, after they have saved; torchrun waits 30 s
# for that, which cannot be set, then kills. A signal to a worker itself leads all ranks to save and end with code 75,
# which torchrun takes for a failure: it starts them again while restarts are left. torchrun's own exit code is 1 after
# all of these. A run that was asked to leave has a file "preempted" in its folder, which is gone when it goes on.
# Where the machine of FIRST_MACHINE disappears, everything ends, because the meeting point was there.
endpoint=$1
shift
# torchrun 2.11 would otherwise keep one store over all attempts, where new ranks find the addresses of dead ones.
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

#!/bin/bash
# One stage of training on machines that share the folder FOLDER: HOSTS="a b" FOLDER=/shared/d2g bash train.sh gan
# All hosts meet at the first one, which must be reachable at PORT.
set -euo pipefail

stage=$1
init=
if [ "$stage" = gan ]; then init="--init runs/ode"; fi
read -ra hosts <<<"$HOSTS"
command="d2g launch --nodes ${#hosts[@]} --gpus ${GPUS:-8} --rendezvous ${hosts[0]}:${PORT:-29500} -- \
  distill $stage --preset ${PRESET:-sd15-cfg3} --teacher ${SD:-stable-diffusion-v1-5/stable-diffusion-v1-5} \
  --pairs pairs --lpips ${LPIPS:-lpips-sd15} $init --out runs/$stage"
for host in "${hosts[@]}"; do
  ssh "$host" "cd $FOLDER && $command" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"

#!/bin/bash
# Pairs on machines that share the folder FOLDER: HOSTS="a b" GPUS=8 FOLDER=/shared/d2g bash pairs.sh
# One process per GPU. They know nothing of each other: a host may join or leave at any time.
set -euo pipefail

command="d2g pairs generate --preset ${PRESET:-sd15-cfg3} \
  --teacher ${SD:-stable-diffusion-v1-5/stable-diffusion-v1-5} --prompts prompts.txt --out pairs"
for host in $HOSTS; do
  for ((gpu = 0; gpu < ${GPUS:-8}; gpu++)); do
    ssh "$host" "cd $FOLDER && CUDA_VISIBLE_DEVICES=$gpu $command" &
  done
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"

#!/usr/bin/env bash
# Starts parti-jax train on every host of a slice, with all arguments that are not this script's.
# The run goes on when this script has ended. A second run beside a first is refused.
#
#   launch/tpu_vm/run.sh --gin_file=gin_configs/runs/parti_20b.gin --model_dir=gs://BUCKET/FOLDER \
#     --gin.token_cache.path="'gs://BUCKET/TOKENS'" [--gin.NAME=VALUE ...]
#
#   --shared_disk  the folder of --model_dir is not in Cloud Storage, but all hosts mount its disk
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

shared_disk=''
read_flags '' shared_disk "$@"

model_dir=''
for ((i = 0; i < ${#rest[@]}; i++)); do
  case ${rest[i]} in
    --model_dir=*) model_dir=${rest[i]#*=} ;;
    --model_dir) model_dir=${rest[i + 1]:-} ;;
  esac
done

# Whether the slice is of a type that has one host.
one_host() {
  local words=() word
  recall create || return
  for word in "${words[@]}"; do
    [[ $word =~ ^--type=(v[234]-8|v5p-8|v5litepod-[148]|v6e-[148])$ ]] && return
  done
  return 1
}

[[ -n $model_dir ]] || fail 'where to? Give --model_dir=gs://BUCKET/FOLDER'
if [[ $model_dir != gs://* && -z $shared_disk ]] && ! one_host; then
  fail "--model_dir=$model_dir: the hosts of a slice share no disk, and each would write there a\
 part of every checkpoint; give a folder in Cloud Storage, gs://BUCKET/FOLDER (or, when all hosts\
 mount that folder, --shared_disk)"
fi

on_hosts all "bash $on_host start train --multi_host $(quoted "${rest[@]}")" \
  || fail "the run did not start on every host, as said above; $here/stop.sh ends it on the others"
keep run ${shared_disk:+--shared_disk} -- "${rest[@]}"
if [[ -z $dry_run ]]; then
  echo "Started. To follow it: $here/logs.sh --name=$name --zone=$zone --project=$project"
fi

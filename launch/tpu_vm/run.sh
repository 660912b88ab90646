#!/usr/bin/env bash
# Starts parti-jax train on every host of a slice, with all arguments that are not this script's.
# The run goes on when this script has ended. A second run beside a first is refused.
#
#   launch/tpu_vm/run.sh --gin_file=gin_configs/runs/parti_20b.gin --model_dir=gs://BUCKET/FOLDER \
#     --gin.token_cache.path="'gs://BUCKET/TOKENS'" [--gin.NAME=VALUE ...]
#
#   --shared_disk  the folder of --model_dir is not in Cloud Storage, but all hosts mount its disk
set -euo pipefail

# shellcheck source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

start_on_hosts run train model_dir 'every checkpoint' "$@"

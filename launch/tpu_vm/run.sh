#!/usr/bin/env bash
# Starts parti-jax train on every host of a slice and passes on all arguments except its own flags.
# The run continues after this script has ended. A second run at the same time is refused.
#
#   launch/tpu_vm/run.sh --gin_file=gin_configs/runs/parti_20b.gin --model_dir=gs://BUCKET/FOLDER \
#     --gin.token_cache.path="'gs://BUCKET/TOKENS'" [--gin.NAME=VALUE ...]
#
#   --shared_disk  the folder of --model_dir is not in Cloud Storage, but all hosts mount its disk
set -euo pipefail

# shellcheck source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

start_on_hosts run train model_dir 'every checkpoint' "$@"

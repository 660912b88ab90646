#!/usr/bin/env bash
# Starts parti-jax tokenize on every host of a slice and passes on all arguments except its own flags.
# Each host tokenizes its part of the pictures. As with run.sh, it continues after this script has
# ended; logs.sh, status.sh, stop.sh and resume.sh work for it; and a second run is refused.
#
#   launch/tpu_vm/tokenize.sh --gin_file=gin_configs/tasks/webdataset.gin \
#     --gin.webdataset.path="'gs://BUCKET/PICTURES'" --tokenizer=gs://BUCKET/TOKENIZER \
#     --output_dir=gs://BUCKET/TOKENS [--gin.NAME=VALUE ...]
#
#   --shared_disk  the folder of --output_dir is not in Cloud Storage, but all hosts mount its disk
set -euo pipefail

# shellcheck source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

start_on_hosts tokenize tokenize output_dir 'the tokens' "$@"

#!/usr/bin/env bash
# Deletes a queued resource with its slice, whatever runs there, and forgets what resume.sh would
# need. What the run wrote to Cloud Storage stays. gcloud asks first.
#
#   launch/tpu_vm/delete.sh [--yes]
#
#   --yes  without being asked
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

yes=''
read_flags '' yes "$@"
no_rest

tpus queued-resources delete "$name" --force ${yes:+--quiet}
run rm -rf "$kept"

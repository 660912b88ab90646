#!/usr/bin/env bash
# Deletes a queued resource and its slice, even if a run is active, and removes what resume.sh would
# need. What the run wrote to Cloud Storage is kept. gcloud asks for confirmation.
#
#   launch/tpu_vm/delete.sh [--yes]
#
#   --yes  don't ask for confirmation
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

yes=''
read_flags '' yes "$@"
no_rest

tpus queued-resources delete "$name" --force ${yes:+--quiet}
run rm -rf "$kept"

#!/usr/bin/env bash
# Prints the state of a queued resource and, when it is ACTIVE, the state of each host: none (nothing
# was started), running, finished, stopped, failed STATUS, or gone (asked to stop, or ended without a
# status because the host is being taken away or was restarted).
#
#   launch/tpu_vm/status.sh
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_flags '' '' "$@"
no_rest

state=$(queued_state)
echo "$state"
if [[ $state == ACTIVE || -n $dry_run ]]; then
  host_states
fi

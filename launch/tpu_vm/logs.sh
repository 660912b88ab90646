#!/usr/bin/env bash
# Follows the log of a run until the run ends or you press Ctrl-C, which doesn't affect the run.
#
#   launch/tpu_vm/logs.sh [--worker=all]
#
#   --worker=WORKER  which host: a number, or `all` (default: 0, the one that reports losses)
#   --lines=LINES    number of earlier lines to show first (default: 100)
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

worker=0 lines=100
read_flags 'worker lines' '' "$@"
no_rest
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines=$lines: not a number"

on_hosts "$worker" "bash $on_host logs $lines"

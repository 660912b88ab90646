#!/usr/bin/env bash
# Ends the run on every host of a slice; resume.sh starts it again, from its last checkpoint or its
# finished parts.
#
#   launch/tpu_vm/stop.sh
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

read_flags '' '' "$@"
no_rest

on_hosts all "bash $on_host stop stopped"

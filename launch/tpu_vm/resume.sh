#!/usr/bin/env bash
# Brings a run back that create.sh, install.sh and then run.sh or tokenize.sh started from this
# computer: asks again for a slice that was preempted or failed, waits for it, installs the same
# commit and starts the same command, which goes on from its last checkpoint or its finished parts.
# A run that goes on is left alone.
#
#   launch/tpu_vm/resume.sh [--watch]
#
#   --watch    does so each time it is needed, until the run is finished, is stopped or fails itself
#   --dry_run  prints what follows a preemption
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

watch=''
read_flags '' watch "$@"
no_rest
slice=(--name="$name" --zone="$zone" --project="$project" ${dry_run:+--dry_run})

# again SCRIPT: calls a script of this folder with what it was given before.
again() {
  local words=()
  recall "$1" || fail "nothing is known here of $name in $zone that $1.sh has done;\
 call $here/$1.sh itself, or resume.sh on the computer and account that did"
  "$here/$1.sh" "${slice[@]}" "${words[@]}"
}

# Prints one word for all hosts: running, finished, stopped, failed, or broken (on some there is no
# run any more: to be started again).
run_state() {
  local states
  states=$(host_states) || return
  case $states in
    *' none'* | *' gone'*) echo broken ;;
    *' failed'*) echo failed ;;
    *' running'*) echo running ;;
    *' stopped'*) echo stopped ;;
    *' finished'*) echo finished ;;
    *) return 1 ;;
  esac
}

resume() {
  local state=SUSPENDED hosts
  [[ -n $dry_run ]] || state=$(queued_state)
  case $state in
    SUSPENDING | SUSPENDED | FAILED)
      tpus queued-resources delete "$name" --force --quiet
      again create ;;
    NONE) again create ;;
    *)
      wait_until_active
      hosts=$(run_state)
      if [[ $hosts == running || $hosts == finished ]]; then
        echo "$name: the run is $hosts"
        return
      fi
      # Hosts that wait for one that is gone.
      on_hosts all "if [ -e $on_host ]; then bash $on_host stop gone; fi" ;;
  esac
  again install
  if [[ -f $kept/tokenize ]]; then
    again tokenize
  else
    again run
  fi
}

watch() {
  local hosts=broken failures=0
  while true; do
    # A process of its own, so that an error ends it and not the watch.
    if [[ $hosts == broken ]]; then
      "$here/resume.sh" "${slice[@]}" || echo "$name: not resumed; trying again" >&2
    fi
    sleep "$poll_seconds"
    case $(queued_state || echo unknown) in
      ACTIVE) hosts=$(run_state) || hosts=unknown ;;
      unknown) hosts=unknown ;;
      *) hosts=broken ;;
    esac
    # A host that is about to be preempted may end its run with an error: look twice.
    if [[ $hosts == failed ]] && ((++failures > 1)); then
      echo "$name: the run failed; see $here/logs.sh" >&2
      exit 1
    fi
    [[ $hosts == failed ]] || failures=0
    if [[ $hosts == finished || $hosts == stopped ]]; then
      echo "$name: the run is $hosts"
      return
    fi
  done
}

if [[ -n $watch && -z $dry_run ]]; then
  watch
else
  resume
fi

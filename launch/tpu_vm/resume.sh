#!/usr/bin/env bash
# Restores a run that create.sh, install.sh and then run.sh or tokenize.sh started from this computer:
# requests a slice that was preempted or failed again, waits for it, installs the same commit and
# starts the same command, which resumes from its last checkpoint or its finished parts.
# A run that is still active is left alone.
#
#   launch/tpu_vm/resume.sh [--watch]
#
#   --watch    repeat this whenever needed, until the run finishes, is stopped or fails by itself
#   --dry_run  print the commands that follow a preemption
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

watch=''
read_flags '' watch "$@"
no_rest
slice=(--name="$name" --zone="$zone" --project="$project" ${dry_run:+--dry_run})

# again SCRIPT: calls a script of this folder with its previous arguments.
again() {
  local words=()
  recall "$1" || fail "$1.sh was not called for $name in $zone from this computer and account;\
 call $here/$1.sh, or call resume.sh where it was"
  "$here/$1.sh" "${slice[@]}" "${words[@]}"
}

# Prints one word for all hosts: running, finished, stopped, failed, or broken (some hosts no longer
# have a run, so it has to be restarted).
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
    # In a subprocess, so that an error doesn't end the watch.
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

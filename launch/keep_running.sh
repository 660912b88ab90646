#!/usr/bin/env bash
# Trains on one machine and restarts the command, which resumes from its last checkpoint, when it was
# asked to stop and has saved (status 75), and when it crashed or was killed, for example because
# memory ran out. It gives up after several crashes without a new checkpoint between them, and
# immediately after bad input (status 2) or Ctrl-C. SIGTERM to this script is passed on to the command
# and ends both.
#
#   launch/keep_running.sh [--tries=N] parti-jax train --model_dir=FOLDER [ARGUMENTS ...]
#
#   --tries=N  number of crashes without a new checkpoint after which it gives up (default: 3)
#
# KEEP_RUNNING_SECONDS  seconds to wait before a restart (default: 10)
set -euo pipefail

fail() {
  printf 'keep_running.sh: error: %s\n' "$1" >&2
  exit 2
}

say() {
  printf 'keep_running.sh: %s\n' "$1" >&2
}

tries=3
if [[ ${1:-} == --tries=* ]]; then
  tries=${1#*=}
  shift
fi
[[ $tries =~ ^[1-9][0-9]*$ ]] || fail "--tries=$tries: not a number from 1"
(($#)) || fail 'no command given; for example: parti-jax train --model_dir=FOLDER ...'

model_dir='' before=''
for argument in "$@"; do
  case $argument in
    --model_dir=*) model_dir=${argument#*=} ;;
    *) [[ $before != --model_dir ]] || model_dir=$argument ;;
  esac
  before=$argument
done
[[ -n $model_dir ]] || fail 'the command needs --model_dir=FOLDER, where this script looks for checkpoints'

# Prints the step of the newest checkpoint; prints nothing without one, or if the run is at a URL.
newest() {
  local folder step most=''
  for folder in "$model_dir"/checkpoints/*/; do
    step=$(basename "$folder")
    [[ $step =~ ^[0-9]+$ && (-z $most || $step -gt $most) ]] && most=$step
  done
  printf %s "$most"
}

# A signal is passed on to the command, which is then not restarted.
# shellcheck source=child.sh
source "$(dirname "${BASH_SOURCE[0]}")/child.sh"

crashes=0
while true; do
  was=$(newest)
  status=0
  run "$@" || status=$?
  case $status in
    0 | 2 | 126 | 127 | 130) exit "$status" ;;
    75 | 143) why='was asked to stop' ;;
    *)
      why="ended with status $status"
      [[ $(newest) == "$was" ]] || crashes=0
      crashes=$((crashes + 1))
      if ((crashes >= tries)); then
        say "the command $why; $crashes times without a new checkpoint: giving up"
        exit "$status"
      fi ;;
  esac
  [[ -z $stopping ]] || exit "$status"
  say "the command $why; it is started again from ${was:+the newest checkpoint in }$model_dir"
  sleep "${KEEP_RUNNING_SECONDS:-10}" &
  wait $! || true
  [[ -z $stopping ]] || exit 75
done

# shellcheck shell=bash
# Read by scripts of this folder that run long commands: passes signals on to the one that runs.
#
# stopping  not empty once a signal has come; the script should then end

stopping='' child=''
forward() {
  # shellcheck disable=SC2034  # The scripts that read this file look at it.
  stopping=yes
  [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP
# Without job control Bash would have commands in the background ignore Ctrl-C.
set -m

# Runs a command and returns its status.
run() {
  local status=0
  # In the background, since bash would look at signals only after the end of another command.
  "$@" </dev/null &
  child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do  # A signal has ended `wait` and not the command.
    status=0
    wait "$child" || status=$?
  done
  child=''
  return "$status"
}

#!/usr/bin/env bash
# Called on every host of a slice by the other scripts of this folder. Everything is in
# ~/parti_jax: source/ (the commit), venv/, log, and the pid of the last run and, once it has ended,
# its status.
#
#   on_host.sh install          installs what is in ~/parti_jax/new
#   on_host.sh start ARGUMENTS  starts parti-jax ARGUMENTS
#   on_host.sh status | logs LINES | stop STATUS
set -euo pipefail

home=$HOME/parti_jax

fail() {
  printf '%s: error: %s\n' "$(hostname)" "$1" >&2
  exit 2
}

# A run holds this lock as long as any of its processes lives.
running() {
  ! flock --nonblock "$home/lock" true
}

install_new() {
  ! running || fail 'a run is active here; end it with stop.sh before you install'
  rm -rf "$home/source"
  mv "$home/new" "$home/source"
  export PARTI_JAX_VENV=$home/venv PYTHON
  # shellcheck source=../environment.sh
  source "$home/source/launch/environment.sh"
  # Ubuntu 22.04 only has Python 3.10.
  if [[ ! -x $venv/bin/pip ]] && ! PYTHON=$(find_python 2>/dev/null); then
    python3 -m pip install --quiet --upgrade --target "$home/uv" uv
    "$home/uv/bin/uv" python install 3.12
    PYTHON=$("$home/uv/bin/uv" python find --managed-python 3.12)
  fi
  install '.[data,tpu,gcs]'
}

start() {
  [[ -x $home/venv/bin/parti-jax ]] || fail 'parti_jax is not installed here; call install.sh'
  exec 9>"$home/lock"
  flock --nonblock 9 || fail 'a run is active here already; see status.sh, or end it with stop.sh'
  rm -f "$home/status"
  cd "$home/source"
  printf '%s: parti-jax %s\n' "$(date)" "$*" >>"$home/log"
  # It keeps descriptor 9, and with it the lock; as the leader of a session it outlives ssh. The
  # trap lets it write the status of a command that a signal ends.
  # shellcheck disable=SC2016
  PYTHONUNBUFFERED=1 setsid bash -c 'trap : TERM; "${@:2}"; echo $? >"$1"' run \
    "$home/status" "$home/venv/bin/parti-jax" "$@" </dev/null >>"$home/log" 2>&1 &
  echo $! >"$home/pid"
  echo "$(hostname) started"
}

status() {
  local state=none
  if running; then
    state=running
  elif [[ -f $home/status ]]; then
    state=$(<"$home/status")
    case $state in
      0) state=finished ;;
      # Asked to stop, but not by stop.sh: the host is being taken away. 143 means that Python itself
      # was still starting.
      75 | 143) state=gone ;;
      [1-9]*) state="failed $state" ;;
    esac
  elif [[ -f $home/pid ]]; then
    state=gone
  fi
  echo "$(hostname) $state"
}

logs() {
  [[ -f $home/pid ]] || fail 'nothing was started here; call run.sh or tokenize.sh'
  tail -n "$1" -F --pid="$(<"$home/pid")" "$home/log" | sed -u "s/^/$(hostname): /"
}

# stop STATUS: ends the run; STATUS is what `status` reports from then on.
stop() {
  if running; then
    kill -TERM -- "-$(<"$home/pid")"
    flock --timeout 300 "$home/lock" true || kill -KILL -- "-$(<"$home/pid")"
    flock --timeout 30 "$home/lock" true || fail 'processes of the run are still alive'
    rm -f "$home/status"
  fi
  [[ ! -f $home/pid || -f $home/status ]] || echo "$1" >"$home/status"
  status
}

mkdir -p "$home"
case ${1:-} in
  install) install_new ;;
  start) start "${@:2}" ;;
  logs | stop) "$1" "$2" ;;
  status) status ;;
  *) fail "${1:-nothing}: not one of install, start, status, logs, stop" ;;
esac

# shellcheck shell=bash
# Flags of every script in this folder; the environment variable in brackets is the default.
#
#   --name=NAME        the slice, and the queued resource that asks for it (TPU_NAME)
#   --zone=ZONE        such as us-central2-b (ZONE)
#   --project=PROJECT  of Google Cloud (PROJECT)
#   --dry_run          print the commands instead of running them
#   --help
#
# TPU_SSH_FLAGS     more flags for every gcloud ssh and scp, such as --internal-ip
# TPU_POLL_SECONDS  seconds between polls of a state (default: 30)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${TPU_NAME:-} zone=${ZONE:-} project=${PROJECT:-} dry_run=
poll_seconds=${TPU_POLL_SECONDS:-30}
read -r -a ssh_flags <<<"${TPU_SSH_FLAGS:-}"
# The path of this folder on every host after install.sh.
on_host=parti_jax/source/launch/tpu_vm/on_host.sh

fail() {
  printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# Prints the comment at the top of a script.
help_of() {
  sed -n '/^# *shellcheck/d; /^#!/d; /^#/!q; s/^# \{0,1\}//p' "$1"
}

# read_flags VALUED SWITCHES ARGUMENT...: puts the value of every flag into the variable of its
# name, and what is not among these flags or comes after `--` into `rest`.
read_flags() {
  local valued=" name zone project $1 " switches=" dry_run $2 " flag
  shift 2
  rest=()
  while (($#)); do
    flag=${1%%=*}
    flag=${flag#--}
    if [[ $1 == -- ]]; then
      rest+=("${@:2}")
      break
    elif [[ $1 == --help ]]; then
      help_of "$0"
      help_of "$here/settings.sh"
      exit
    elif [[ $1 == --*=* && $valued == *" $flag "* ]]; then
      printf -v "$flag" %s "${1#*=}"
    elif [[ $1 == --* && $valued == *" $flag "* ]]; then
      (($# > 1)) || fail "$1: no value; write $1=VALUE"
      printf -v "$flag" %s "$2"
      shift
    elif [[ $1 == "--$flag" && $switches == *" $flag "* ]]; then
      printf -v "$flag" %s yes
    else
      rest+=("$1")
    fi
    shift
  done
  check_slice
}

check_slice() {
  [[ -n $name ]] || fail 'no slice given; use --name=NAME, or export TPU_NAME=NAME'
  [[ -n $zone ]] || fail 'no zone given; use --zone=ZONE, or export ZONE=ZONE'
  [[ -n $project ]] || fail 'no project given; use --project=PROJECT, or export PROJECT=PROJECT'
  local value
  for value in "$name" "$zone" "$project"; do
    [[ $value =~ ^[a-z][a-z0-9.:-]*$ ]] \
      || fail "$value: names, zones and projects consist of lower-case letters, digits and hyphens"
  done
  # Keeps the request, so that resume.sh can repeat it.
  kept=${XDG_STATE_HOME:-$HOME/.local/state}/parti_jax/$project/$zone/$name
  [[ -n $dry_run ]] && return
  command -v gcloud >/dev/null \
    || fail 'needs gcloud, the Google Cloud CLI; see https://cloud.google.com/sdk/docs/install'
  [[ -n $(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null) ]] \
    || fail 'gcloud is not logged in; run: gcloud auth login'
}

# Refuses what read_flags left.
no_rest() {
  ((${#rest[@]} == 0)) || fail "unknown argument ${rest[0]}; see $0 --help"
}

# Prints words, quoted for a shell.
quoted() {
  local word separator=
  for word in "$@"; do
    printf %s "$separator"
    separator=' '
    if [[ -n $word && $word != *[!A-Za-z0-9_.,:/@%+=-]* ]]; then
      printf %s "$word"
      continue
    fi
    printf "'"
    while [[ $word == *"'"* ]]; do
      printf "%s'\\\\''" "${word%%"'"*}"
      word=${word#*"'"}
    done
    printf "%s'" "$word"
  done
}

# Runs a command, or prints it when --dry_run is given.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

tpus() {
  run gcloud compute tpus "$@" --zone="$zone" --project="$project"
}

# on_hosts WORKERS COMMAND: runs a shell's command on hosts of the slice (`all`, or a number).
on_hosts() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2" ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# keep FILE WORD...
keep() {
  [[ -n $dry_run ]] && return
  mkdir -p "$kept"
  quoted "${@:2}" >"$kept/$1"
}

# recall FILE: puts the words kept there into `words`.
recall() {
  [[ -f $kept/$1 ]] || return
  eval "words=($(<"$kept/$1"))"
}

# Prints the state of the queued resource, or NONE if it doesn't exist.
queued_state() {
  local answer
  if answer=$(tpus queued-resources describe "$name" --format='value(state.state)' \
      --verbosity=error 2>&1); then
    printf '%s\n' "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    printf '%s\n' "$answer" >&2
    return 1
  fi
}

wait_until_active() {
  local state before=
  if [[ -n $dry_run ]]; then
    queued_state
    return
  fi
  while true; do
    # Don't give up a place in the queue because one request failed.
    state=$(queued_state) || state=unknown
    [[ $state == "$before" ]] || echo "$name: $state"
    before=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | NONE)
        fail "the queued resource $name is $state; request it again with $here/resume.sh,\
 or end it with $here/delete.sh" ;;
    esac
    sleep "$poll_seconds"
  done
}

# Prints one line for each host: its name, and none, running, finished, stopped, gone or failed.
host_states() {
  on_hosts all "if [ -e $on_host ]; then bash $on_host status; else echo \"\$(hostname) none\"; fi"
}

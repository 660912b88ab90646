# shellcheck shell=bash
# Shared by run.sh and tokenize.sh: starts a command of parti-jax on every host of a slice.

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# Whether the slice is of a type that has one host.
one_host() {
  local words=() word
  recall create || return
  for word in "${words[@]}"; do
    [[ $word =~ ^--type=(v[234]-8|v5p-8|v5litepod-[148]|v6e-[148])$ ]] && return
  done
  return 1
}

# Prints the value of a flag among `rest`.
value_of() {
  local i
  for ((i = 0; i < ${#rest[@]}; i++)); do
    case ${rest[i]} in
      "--$1="*) printf %s "${rest[i]#*=}" ;;
      "--$1") printf %s "${rest[i + 1]:-}" ;;
    esac
  done
}

# start_on_hosts SCRIPT COMMAND FLAG WHAT ARGUMENT...: starts `parti-jax COMMAND --multi_host` with
# the arguments. All hosts write parts of WHAT to the folder of --FLAG. resume.sh finds the
# arguments as those of SCRIPT.
start_on_hosts() {
  local script=$1 command=$2 flag=$3 what=$4 shared_disk='' folder
  read_flags '' shared_disk "${@:5}"
  folder=$(value_of "$flag")
  [[ -n $folder ]] || fail "no --$flag given; use --$flag=gs://BUCKET/FOLDER"
  if [[ $folder != gs://* && -z $shared_disk ]] && ! one_host; then
    fail "--$flag=$folder: the hosts of a slice don't share a disk, and each would write its own\
 part of $what; give a folder in Cloud Storage, gs://BUCKET/FOLDER (or, if all hosts\
 mount that folder, --shared_disk)"
  fi

  on_hosts all "bash $on_host start $command --multi_host $(quoted "${rest[@]}")" \
    || fail "the run did not start on every host, see above; $here/stop.sh ends it on the\
 others"
  [[ -n $dry_run ]] || rm -f "$kept/run" "$kept/tokenize"
  keep "$script" ${shared_disk:+--shared_disk} -- "${rest[@]}"
  if [[ -z $dry_run ]]; then
    echo "Started. To follow it: $here/logs.sh --name=$name --zone=$zone --project=$project"
  fi
}

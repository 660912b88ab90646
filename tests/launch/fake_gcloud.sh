#!/bin/bash
# Stands in for gcloud: the folder FAKE_CLOUD holds the state of the one queued resource in `state`,
# and each host's home in `hosts/`. Every call is appended to `calls`.
cd "$FAKE_CLOUD" || exit
printf '%s\n' "$*" >>calls

flag() {
  local word
  for word in "${@:2}"; do
    [[ $word != "--$1="* ]] || printf %s "${word#*=}"
  done
}

on_host() {
  cd "$1" && HOME=$PWD PATH=$FAKE_CLOUD/host_bin:$PATH HOST=${1##*/} bash -c "$2" </dev/null
}

case "$*" in
  'auth list '*) cat account 2>/dev/null ;;
  *'queued-resources describe '*)
    if [[ ! -f state ]]; then
      echo 'ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource' >&2
      exit 1
    fi
    cat state ;;
  *'queued-resources create '*)
    mkdir hosts && cp next_state state
    cp -R new_host hosts/host0 && cp -R new_host hosts/host1 ;;
  *'queued-resources delete '*)
    for host in hosts/*; do
      kill -KILL -- "-$(<"$host/parti_jax/pid")"
    done
    rm -r state hosts ;;
  *'tpu-vm scp '*)
    for host in hosts/*; do cp "$5" "$host/${6#*:}"; done ;;
  *'tpu-vm ssh '*)
    worker=$(flag worker "$@") status=0
    for host in hosts/host*; do
      if [[ $worker == all || $host == "hosts/host$worker" ]]; then
        (on_host "$host" "$(flag command "$@")") || status=$?
      fi
    done
    exit "$status" ;;
  *) exit 64 ;;
esac

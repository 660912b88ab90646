#!/usr/bin/env bash
# Requests a slice of TPU VMs with a queued resource and waits until it is ready. Ctrl-C only ends the
# waiting; resume.sh waits for the same slice again.
#
#   launch/tpu_vm/create.sh --type=v4-1024 [--spot] [FLAGS OF gcloud ... queued-resources create]
#
#   --type=TYPE        accelerator type: v4-512, v5litepod-256, v5p-1024, v6e-256 ... (TPU_TYPE)
#   --version=VERSION  runtime version (default: the one that Google recommends for JAX on that type)
#   --spot             a cheaper slice that may be taken away; see resume.sh --watch
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

type=${TPU_TYPE:-} version='' spot=''
read_flags 'type version' spot "$@"

[[ -n $type ]] || fail 'no --type given; use --type=TYPE, such as --type=v4-1024'
case $type in
  v[234]-*) default=tpu-ubuntu2204-base ;;
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  tpu7x*) fail "--type=$type: these TPUs are only available through GKE; see docs/gke.md" ;;
  *)
    default=''
    [[ -n $version ]] || fail "--type=$type: not a v2, v3, v4, v5litepod, v5p or v6e; if it is\
 newer than this script, give --version=RUNTIME_VERSION as well" ;;
esac
version=${version:-$default}

tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
  --runtime-version="$version" --async ${spot:+--spot} ${rest[@]+"${rest[@]}"}
keep create --type="$type" --version="$version" ${spot:+--spot} ${rest[@]+"${rest[@]}"}
wait_until_active

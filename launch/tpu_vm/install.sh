#!/usr/bin/env bash
# Installs a commit of this repository, with its `data` and `tpu` extras, in ~/parti_jax on every
# host of a slice.
#
#   launch/tpu_vm/install.sh [--revision=COMMIT] [--url=URL]
#
#   --revision=COMMIT  the commit to send from this checkout, 11 MB to each host (default: HEAD)
#   --url=URL          clone the repository from there instead; needs --revision
set -euo pipefail

# shellcheck source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

url='' revision=''
read_flags 'url revision' '' "$@"
no_rest

new=parti_jax/new
if [[ -n $url ]]; then
  [[ -n $revision ]] \
    || fail '--url: give --revision=COMMIT as well, so that every host has the same'
  get="git clone --quiet $(quoted "$url") $new &&\
 git -C $new checkout --quiet $(quoted "$revision")"
else
  checkout=$(cd "$here/../.." && pwd)
  asked=${revision:-HEAD}
  revision=$(git -C "$checkout" rev-parse --verify --quiet "$asked^{commit}") \
    || fail "--revision=$asked: $checkout has no such commit; give one that it has,\
 or --url=URL --revision=COMMIT"
  if [[ -n $(git -C "$checkout" status --porcelain) ]]; then
    echo "Changes in $checkout that are not committed are not sent" >&2
  fi
  run mkdir -p "$kept"
  run git -C "$checkout" archive --format=tar.gz --output="$kept/source.tar.gz" "$revision"
  tpus tpu-vm scp "$kept/source.tar.gz" "$name:parti_jax_source.tar.gz" --worker=all \
    ${ssh_flags[@]+"${ssh_flags[@]}"}
  get="tar -xzf parti_jax_source.tar.gz -C $new"
fi
on_hosts all \
  "rm -rf $new && mkdir -p $new && $get && bash $new/launch/tpu_vm/on_host.sh install"
keep install ${url:+"--url=$url"} --revision="$revision"

#!/usr/bin/env bash
# Checks formatting, lint, types, spelling and the documentation, and names every check that failed.
#
#   launch/check.sh
#
# Installs the package with its dev extra first. PARTI_JAX_VENV and PYTHON choose the environment's
# folder and its Python: see environment.sh.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install '.[dev]'
cd "$repository"
failed='' site=''
said=$(mktemp)
trap '[[ -z $site ]] || kill "$site"; rm -f "$said"' EXIT
check() {
  local name=$1
  shift
  "$@" || failed="$failed${failed:+, }$name"
}
# Next to the others, since it and mypy take longest. Material announces the end of MkDocs 1 on every build.
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict >"$said" 2>&1 &
site=$!
check 'ruff check' "$venv/bin/ruff" check .
check 'ruff format' "$venv/bin/ruff" format --check .
check mypy "$venv/bin/mypy"
check codespell "$venv/bin/codespell"
check mkdocs wait "$site"
site=''
cat "$said"
if [[ -n $failed ]]; then
  fail "these checks failed: $failed"
fi
echo 'All checks passed'

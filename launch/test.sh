#!/usr/bin/env bash
# Installs the package with its test extra and runs the tests.
#
#   launch/test.sh                      all tests but the slow ones
#   launch/test.sh -m slow              the slow ones
#   launch/test.sh tests/cli/test_main.py   any other arguments of pytest
#   launch/test.sh --lowest [...]       with the lowest versions that setup.cfg allows, in .venv_lowest
#
# PARTI_JAX_VENV and PYTHON choose the environment's folder and its Python: see environment.sh.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ ${1:-} == --lowest ]]; then
  shift
  versions=lowest
  venv=${PARTI_JAX_VENV:-$repository/.venv_lowest}
fi
install '.[test]'
cd "$repository"
# In the order of the files: by default those of the fewest tests come last, among them the longest one.
exec "$venv/bin/python" -P -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder "$@"

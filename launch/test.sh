#!/usr/bin/env bash
# Installs the package with its test extra and runs the tests.
#
#   launch/test.sh                      all tests but the slow ones
#   launch/test.sh -m slow              the slow ones
#   launch/test.sh tests/test_main.py   any other arguments of pytest
#
# PARTI_JAX_VENV and PYTHON choose the environment's folder and its Python: see environment.sh.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install '.[test]'
cd "$repository"
exec "$venv/bin/python" -P -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"

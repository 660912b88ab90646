#!/usr/bin/env bash
# Draws four pictures with the demo model. The first run creates a virtual environment and installs
# the package in it.
#
#   launch/quickstart.sh "woman firefighter: dark skin tone" [ARGUMENTS OF parti-jax generate]
#
# PARTI_JAX_VENV and PYTHON choose the environment's folder and its Python: see environment.sh.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if (($# == 0)); then
  set -- 'woman firefighter: dark skin tone'
  echo "No prompt given; drawing \"$1\""
fi

install .
exec "$venv/bin/parti-jax" generate "$@"

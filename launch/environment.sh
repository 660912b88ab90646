# shellcheck shell=bash
# Read by the other scripts of this folder: makes the virtual environment and installs the package.
#
# PARTI_JAX_VENV  folder of the environment (default: .venv at the top of the repository)
# PYTHON          the Python to make it with (default: the first of python3.11 to 3.13 found)

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PARTI_JAX_VENV:-$repository/.venv}
# The versions to install within the bounds of setup.cfg: highest or, with uv, lowest.
versions=highest

fail() {
  printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# Prints the command of a Python that the package runs on.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    # Running it is the only sure test: version managers put commands on the PATH that only fail.
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
        >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    if [[ -n ${PYTHON:-} ]]; then
      fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
    fi
  done
  fail "needs Python 3.11, 3.12 or 3.13 and found none; install one (from python.org or your\
 system's packages), or name one: PYTHON=/path/to/python3.11 $0"
}

# Prints a checksum of everything that an installation depends on.
source_state() {
  (
    cd "$repository" || exit
    find parti_jax gin_configs setup.cfg pyproject.toml -type f ! -name '*.pyc' \
      -exec cksum {} + | LC_ALL=C sort | cksum
  )
}

# install REQUIREMENT: installs `.` or `.[extra]` from the repository into the environment, unless
# the same files are installed there already.
install() {
  local requirement=$1 python state stamp larger other
  local installer=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off)
  stamp=$venv/parti_jax_installed_$(printf '%s' "$requirement" | tr -c '[:alnum:]' _)
  # The extra dev has all of test.
  larger=${stamp/%__test_/__dev_}
  # pip is the last thing that venv puts there: without it, venv was interrupted.
  if [[ ! -x $venv/bin/pip ]]; then
    python=$(find_python)
    echo "Making a virtual environment in $venv with $("$python" --version)"
    "$python" -m venv "$venv" \
      || fail "$python -m venv failed; on Debian and Ubuntu install python3-venv"
  fi
  state="$(source_state) $versions"
  for other in "$stamp" "$larger"; do
    if [[ -f $other && $(<"$other") == "$state" ]]; then
      return
    fi
  done
  echo 'Installing parti_jax and the packages it needs (a minute or two)'
  # setuptools would include files that an earlier build left here.
  rm -rf "$repository/build/lib"
  # An installation with other extras stays valid if it is of the same sources and versions.
  for other in "$venv"/parti_jax_installed_*; do
    [[ -f $other && $(<"$other") == "$state" ]] || rm -f "$other"
  done
  (
    cd "$repository" || exit
    if [[ $versions == lowest ]]; then
      "${installer[@]}" uv || exit
      # Without --upgrade it would keep what is installed.
      installer=("$venv/bin/python" -m uv pip install --upgrade --resolution lowest-direct
        --python "$venv/bin/python")
    fi
    "${installer[@]}" "$requirement"
  ) | show_progress || fail 'pip could not install the package; its messages are above'
  printf '%s\n' "$state" >"$stamp"
}

# Keeps only the lines of pip's output that show its progress.
show_progress() {
  local line
  while IFS= read -r line; do
    case $line in
      Collecting* | Building* | Installing*)
        ((${#line} <= 100)) || line=${line:0:97}...
        printf '  %s\n' "$line"
        ;;
    esac
  done
}

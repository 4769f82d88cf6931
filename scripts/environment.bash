# Functions for the scripts in this folder. They source this file at the root of the checkout. Each step is skipped if its
# inputs have not changed since the last run: a stamp beside the result contains the hash of the inputs.

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

hash_of() { cat -- "$@" | sha256sum | cut -d' ' -f1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# need COMMAND:PACKAGE... - install the Debian packages of missing commands.
need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} = 0 ] || install_debian "${missing[@]}"
}

install_debian() {
    if ! command -v apt-get >/dev/null; then
        say "This is not a Debian system. Please install these packages yourself: $*"
        return 1
    fi
    say "Installing Debian packages: $*"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# python_environment KIND - create the virtual environment .venv and install this checkout in it, editable.
# KIND: runtime; redis, with the engine on Redis; dev, with the tools for the tests (includes both); or bench, with the
# peers of the benchmarks.
python_environment() {
    local kind=$1 stamp inputs=(setup.cfg pyproject.toml) target=.
    need python3:python3
    [ -x .venv/bin/python ] || create_virtual_environment
    stamp=$(.venv/bin/python --version; hash_of "${inputs[@]}")
    [ "$(cat ".venv/.stamp-$kind" 2>/dev/null)" = "$stamp" ] && return
    [ "$kind" != bench ] && [ "$(cat .venv/.stamp-dev 2>/dev/null)" = "$stamp" ] && return
    [ "$kind" = runtime ] || target=".[$kind]"
    say "Installing $target into .venv"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --editable "$target" || return
    printf '%s\n' "$stamp" >".venv/.stamp-$kind"
}

create_virtual_environment() {
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "Python 3.11 or newer is required, but python3 is $(python3 --version)"
        return 1
    fi
    python3 -c 'import ensurepip, venv' 2>/dev/null || install_debian python3-venv
    python3 -m venv .venv
}

# npm_packages DIRECTORY - install node_modules according to package-lock.json, without running install scripts.
npm_packages() {
    local directory=$1 stamp
    stamp=$(hash_of "$directory/package-lock.json")
    [ "$(cat "$directory/node_modules/.stamp" 2>/dev/null)" = "$stamp" ] && return
    say "Installing npm packages in $directory"
    (cd "$directory" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null) || return
    printf '%s\n' "$stamp" >"$directory/node_modules/.stamp"
}

# autobahn_testsuite - install the Autobahn Testsuite, which runs on Python 2.7 only, in .autobahn-testsuite. Without a
# Python 2.7 its test is skipped.
autobahn_testsuite() {
    local python package=autobahntestsuite==25.10.1 stamp=.autobahn-testsuite/.stamp
    python=$(python_2_7) || return 0
    [ "$(cat $stamp 2>/dev/null)" = "$python $package" ] && return
    say "Installing $package"
    rm -rf .autobahn-testsuite
    "$python" -m pip install -qq --disable-pip-version-check --target .autobahn-testsuite "$package" 2>/dev/null || {
        say "Continuing without $package"
        return 0
    }
    ln -s "$python" .autobahn-testsuite/python
    printf '%s' "$python $package" >$stamp
}

# python_2_7 - print the path of a Python 2.7 with pip, installed directly or by pyenv.
python_2_7() {
    local python
    for python in "$(command -v python2.7)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/2.7*/bin/python; do
        "$python" -c 'import pip, sys; print(sys.executable)' 2>/dev/null && return
    done
    return 1
}

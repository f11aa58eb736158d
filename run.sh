#!/usr/bin/env bash
# ./run.sh "The capital of France is"      set up, download the demo model, continue the text on several ranks
# ./run.sh tour "Once upon a time"         set up, run the tour of tensor parallelism in one file
# ./run.sh generate "Hi" --tp 2 --stats    set up, run any minitp command (./run.sh --help lists them)
# ./run.sh test [--all | ARGUMENTS]        set up, run tests/core and tests/rooms; or all tests; or pytest ARGUMENTS
# ./run.sh gpu [--only PART] [--budget S]  test, check and measure this machine's GPU, within 8 minutes
# ./run.sh setup                           only set up .venv: Python packages, and an MPI if the system has none
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
python=$venv/bin/python
# Python is run with -I, or as a script, so that it imports nothing from the current directory.
commands=" generate perplexity logprobs trace check judge lint compare bits shard plan bench serve chat tour info "

say() { printf 'minitp: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.10 or later was not found; install it, or run PYTHON=/path/to/python3 ./run.sh"
}

make_venv() {
    [ -e "$venv/made" ] && return
    rm -rf "$venv" # left by an interrupted first run
    local system
    system=$(find_python) || exit
    say "creating .venv with $("$system" --version)"
    # Debian has a part of venv in a separate package; without it, the system's pip can install pip.
    "$system" -I -m venv "$venv" >/dev/null 2>&1 ||
        { "$system" -I -m venv --clear --without-pip "$venv" && "$system" -I -m pip --python "$python" install --quiet pip; } ||
        fail "cannot create .venv: $system lacks venv and pip; on Debian: apt install python3-venv python3-pip"
    touch "$venv/made"
}

# install NAME EXTRAS: install the extras, unless the stamp shows that setup.cfg has not changed since.
install() {
    local stamp=$venv/installed-$1 want
    want=$(cat "$root/setup.cfg" "$root/pyproject.toml" - <<<"$2 $root" | cksum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
    say "installing minitp[$2] into .venv"
    "$python" -I -m pip install --disable-pip-version-check --editable "$root[$2]" 2>"$venv/pip-errors" |
        sed -un 's/^Collecting \([^ ]*\).*/  fetching \1/p
                 s#^Processing .*/\([^/ ]*\)\.whl.*#  using \1#p
                 s/^Installing collected.*/  installing/p' >&2 ||
        { cat "$venv/pip-errors" >&2 && fail "installation failed; the lines above say why"; }
    printf '%s\n' "$want" >"$stamp"
}

# Use the system's MPI if mpi4py works with it; otherwise install PyPI's mpich into .venv.
setup_mpi() {
    if [ ! -e "$venv/installed-mpi" ]; then
        [ ! -e "$venv/system-mpi" ] || return 0
        if command -v mpirun >/dev/null && "$python" -I -c 'from mpi4py import MPI' 2>/dev/null; then
            touch "$venv/system-mpi"
            return
        fi
    fi
    install mpi mpi
}

setup() {
    if command -v flock >/dev/null; then # two setups at the same time take turns
        exec 9>"$root/.setup.lock"
        flock 9
    fi
    make_venv
    local extras=gguf # reads the demo model
    local cuda # the CUDA version of the driver, if there is one
    cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' || true)
    case $cuda in "") ;; 1[3-9]) extras+=,cuda13 ;; *) extras+=,cuda12 ;; esac
    install base "$extras"
    setup_mpi
    case ${1:-} in test | serve) install "$1" "$1" ;; esac
    if [ "${2:-}" = --all ]; then install clients clients; fi
    exec 9>&-
}

case ${1:-} in
    "") { echo "usage:" && sed -n '2,7s/^# /  /p' "${BASH_SOURCE[0]}"; } >&2 && exit 2 ;;
    setup)
        setup
        say "ready: .venv/bin/minitp --help"
        ;;
    test)
        shift
        setup test "${1:-}"
        cd "$root"
        "$python" -c 'from minitp.loading.demo import demo_directory; demo_directory()'
        if [ "${1:-}" = --all ]; then
            shift
            # Starting MPI under Slurm sometimes fails on busy cores, so these tests run separately.
            code=0
            "$python" -m pytest --numprocesses auto --dist loadscope -m "not hosts" tests "$@" || code=$?
            "$python" -m pytest -m hosts tests "$@" || code=$?
            exit "$code"
        fi
        [ $# -gt 0 ] || set -- tests/core tests/rooms
        exec "$python" -m pytest --numprocesses auto --dist worksteal "$@"
        ;;
    gpu)
        shift
        # Relative paths are relative to the caller's folder.
        case ${MINITP_MPICH:-} in "" | /*) ;; *) export MINITP_MPICH=$PWD/$MINITP_MPICH ;; esac
        case ${MINITP_PYTHON:-} in /* | "") ;; */*) MINITP_PYTHON=$PWD/$MINITP_PYTHON ;; esac
        # With MINITP_PYTHON, an interpreter that has all packages, nothing is installed or downloaded.
        if [ -n "${MINITP_PYTHON:-}" ]; then
            python=$MINITP_PYTHON
        else
            setup test
            PIP_RETRIES=1 PIP_TIMEOUT=10 "$venv/bin/minitp" shard --tp 1 >/dev/null ||
                say "there is no demo model, so its checks are skipped"
        fi
        cd "$root" && PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" benchmarks/gpu/run.py "$@"
        ;;
    *)
        setup "$1"
        # Every option begins with a dash; a first word that is not a command is a prompt.
        if [[ $1 != -* && ($1 == *" "* || $commands != *" $1 "*) ]]; then set -- generate "$@"; fi
        exec "$venv/bin/minitp" "$@"
        ;;
esac

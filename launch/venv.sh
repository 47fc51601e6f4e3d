# Sourced by the scripts beside it: makes .venv in the repository with the pinned versions, or keeps what is there.
#   make_venv EXTRA...   and then $python is its interpreter
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python

make_venv() {
    local extras wanted stamp=.venv/.distclip
    extras=$(IFS=,; echo "$*")
    wanted="$extras $(cat pyproject.toml constraints.txt | sha256sum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "Installing distclip[$extras] into .venv (a minute or two the first time) ..."
    [ -x "$python" ] || python3 -m venv .venv
    # torch stands on the same line, pinned: without that, pip takes the newest build and gigabytes of CUDA with it.
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e ".[$extras]"
    echo "$wanted" >"$stamp"
}

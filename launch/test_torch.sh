#!/usr/bin/env bash
# The test suite with another version of torch, in an environment of its own:
#   launch/test_torch.sh VERSION [ARGUMENT OF PYTEST ...]
# Where $PYTHON has that torch, it is used as it is (with pytest and what the tests need) and nothing is installed.
# Settings, by environment variables:
#   PYTHON        the interpreter to use, or to make the environment with; default: python3
#   TORCH_INDEX   where pip looks besides its own index; default: that of PyTorch's CPU builds
#   TORCH_BUILD   the build, as its version ends: cpu (the default), cu128 ... Where it is set, it has an environment of
#                 its own, and $PYTHON is used as it is only if its torch is of that build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! "${1:-}" =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]]; then
    echo "test_torch.sh: name a version of torch such as 2.9.1, got '${1:-}'" >&2
    exit 2
fi
version=$1
shift
python=${PYTHON:-python3}
has_it() {
    local found
    found=$("$1" -c 'import torch; print(torch.__version__)' 2>/dev/null) || return 1
    [ "$found" = "$version+${TORCH_BUILD:-}" ] || { [ -z "${TORCH_BUILD:-}" ] && [ "${found%%+*}" = "$version" ]; }
}

if ! has_it "$python"; then
    venv=.venv-torch-$version${TORCH_BUILD:+-$TORCH_BUILD}
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    python=$venv/bin/python
    if ! has_it "$python"; then
        # Of two builds of one version pip prefers that with a local part, "+cpu". Asked for by name, it cannot take
        # gigabytes of CUDA where the CPU build is missing.
        wanted=torch==$version+${TORCH_BUILD:-cpu}
        # Other packages are as in CI, but for torch itself.
        pins=$(mktemp)
        trap 'rm -f "$pins"' EXIT
        grep -v '^torch==' constraints.txt >"$pins"
        "$python" -m pip install --disable-pip-version-check --extra-index-url \
            "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" -c "$pins" "$wanted" -e ".[dev]" || {
            echo "test_torch.sh: pip could not install $wanted: see above. TORCH_INDEX and TORCH_BUILD (cu128 ...) name" \
                "another place and build; PYTHON an interpreter that has torch $version" >&2
            exit 1
        }
    fi
fi
PYTHONPATH="$PWD" "$python" -m pytest "$@"

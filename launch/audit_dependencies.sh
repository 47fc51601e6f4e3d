#!/usr/bin/env bash
# Known vulnerabilities of the pinned versions in constraints.txt, as the advisory database of PyPI lists them today.
# Needs the network, and pip-audit on the PATH. Installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v pip-audit >/dev/null; then
    echo "audit_dependencies.sh: needs pip-audit, which is no part of this project: pipx install pip-audit" >&2
    exit 2
fi
# The pins are the whole list: nothing is resolved, or fetched to be looked at. --strict: a package that could not be
# looked up is a failure, not a pass (a mirror of PyPI without its advisories knows none).
pip-audit --strict --requirement constraints.txt --no-deps --disable-pip "$@"

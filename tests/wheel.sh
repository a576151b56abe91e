#!/bin/sh
# Install a wheel into a clean environment, away from the source tree, and start what it installs.
# usage: tests/wheel.sh WHEEL PYTHON
set -eu
wheel=$(realpath "$1")
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"$2" -m venv "$directory/venv"
"$directory/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
cd "$directory"
venv/bin/switchover --help > /dev/null
venv/bin/switchover demo --ram 256MiB --json > demo.json
venv/bin/python - <<'PYTHON'
import json

result = json.load(open("demo.json"))
assert (result["result"], result["verified"]) == ("completed", True), result
print(f"wheel: migrated in {result['total_ms']:.0f} ms, verified")
PYTHON

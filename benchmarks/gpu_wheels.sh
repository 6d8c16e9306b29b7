#!/usr/bin/env bash
# Download the small wheels that a bare GPU machine lacks (Python 3.12, x86-64), at the versions of requirements.lock.
#   bash benchmarks/gpu_wheels.sh .whl
# On that machine:  python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site
set -eu
folder=${1:?give the folder for the wheels}
cd "$(dirname "$0")/.."
# The machine has lightning, torch, timm, transformers, peft, torchmetrics, numpy, pyarrow and pandas.
names="jsonargparse docstring-parser typeshed-client datasets dill multiprocess rouge-score nltk joblib gguf"
wanted=()
for name in $names; do
    version=$(sed -n "s/^$name==\([^ ;]*\).*/\1/p" requirements.lock | head -n 1)
    if [ -z "$version" ]; then
        echo "$name is not in requirements.lock: skipped" >&2
        continue
    fi
    wanted+=("$name==$version")
done
mkdir -p "$folder"
for wheel in "${wanted[@]}"; do
    # rouge-score is published without a wheel, so build a wheel of its Python code.
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$folder" "$wheel" 2>/dev/null ||
        python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$wheel"
done
du -sh "$folder"

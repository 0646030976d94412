#!/usr/bin/env bash
# ./run_all.sh          make the environment and the embedded data, train every method and its baselines, print a table
# ./run_all.sh test     make the environment and run all tests, or what further arguments tell pytest
#
# SEEDS="0 1 2" ./run_all.sh repeats every run with three seeds; finished runs are not trained again.
# The active Python is used where it satisfies requirements.txt, otherwise .venv is made (PYTHON chooses its Python).
set -euo pipefail
cd "$(dirname "$0")"

satisfies_requirements() {
    "$1" - <<'PYTHON' 2>/dev/null
import importlib.metadata, re, sys
for line in open("requirements.txt"):
    name, _, least = line.split("#")[0].strip().partition(">=")
    if name:
        have = importlib.metadata.version(name)
        as_numbers = lambda version: [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
        assert not least or as_numbers(have) >= as_numbers(least)
assert sys.version_info >= (3, 10)
import torchvision.ops, torch
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # fails where torch and torchvision do not belong together
PYTHON
}

python=""
for candidate in python3 python .venv/bin/python; do
    if command -v "$candidate" >/dev/null && satisfies_requirements "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "making .venv with the packages of requirements.txt (some minutes, about 6 GB)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    python=.venv/bin/python
    satisfies_requirements "$python" || { echo "error: .venv does not satisfy requirements.txt; delete it and try again" >&2; exit 1; }
fi
echo "using $("$python" -c 'import platform, sys, torch; print(sys.executable, "with Python", platform.python_version(), "and PyTorch", torch.__version__)')"

if [ "${1:-}" = test ]; then
    shift
    exec "$python" -m pytest -q "${@:-tests}"
fi

runs=runs/shapes
train() {  # name of the row in the table, script, options
    local row=$1 script=$2
    shift 2
    for seed in ${SEEDS:-0}; do
        echo "== $row, seed $seed: $script $*"
        "$python" "$script" --seed "$seed" --output "$runs/$row/seed$seed" "$@"
    done
}

train supervised        daw.py --supervised
train supervised_strong daw.py --supervised --strong-labeled
train pseudo_label      daw.py --weighting none
train unimatch          daw.py --weighting fixed
train dawf              daw.py --weighting daw --no-align
train daw               daw.py
train oracle            daw.py --supervised --labeled all

train uniform           pos_meo.py --strategy uniform
train fixed_2_1         pos_meo.py --strategy fixed --fixed-weights 2 1
train fixed_1_2         pos_meo.py --strategy fixed --fixed-weights 1 2
train pos               pos_meo.py --strategy pos
train pos_meo           pos_meo.py
train v2_uniform        pos_meo.py --baseline unimatch_v2 --strategy uniform
train v2_pos_meo        pos_meo.py --baseline unimatch_v2

train diffmatch_discriminative diffmatch.py --discriminative
train diffmatch_no_adjustment  diffmatch.py --tau 0
train diffmatch                diffmatch.py
train diffmatch_no_threshold   diffmatch.py --threshold 0

train usrn_I            usrn.py --model I
train usrn_II           usrn.py --model II
train usrn_III          usrn.py --model III
train usrn_IV           usrn.py --model IV
train usrn              usrn.py
train usrn_plain_kmeans usrn.py --clustering plain

runs=runs/phantom
train supervised        diffrect.py --model supervised
train supervised_strong diffrect.py --model supervised --strong-labeled
train fixmatch          diffrect.py --model fixmatch
train lcc               diffrect.py --model lcc
train diffrect_no_s2w   diffrect.py --no-s2w
train diffrect_no_w2g   diffrect.py --no-w2g
train diffrect          diffrect.py
train oracle            diffrect.py --model supervised --labeled all

"$python" -m common.results runs/shapes
"$python" -m common.results runs/phantom
echo "pictures: runs/*/*/seed*/samples.png, runs/shapes/usrn*/seed*/subclasses/subclasses.png, runs/phantom/*/seed*/rectified.png"

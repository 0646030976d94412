#!/usr/bin/env bash
# ./run_all.sh        environment, embedded data, the main job in short, tables and pictures
# ./run_all.sh all    every row of .docs/rows.txt at full length; SEEDS="0 1 2" repeats each
# ./run_all.sh real DATA [NAMES]   the same rows on the data sets in DATA, by the recipes of
#                     .docs/real.txt, whose names match (default: all but paper_*); JOBS=1 on a GPU
# ./run_all.sh test   environment, all tests; further arguments are pytest's
# The active Python is used where it has requirements.txt, otherwise .venv is made (by $PYTHON).
set -euo pipefail
cd "$(dirname "$0")"
options= data=
folder=runs
rows=$(grep -v "^#" .docs/rows.txt)
case "${1:-short}" in
all | test) ;;
real)  # a recipe: folder, which rows, options; rows' own options come last and win
    data=$(cd "${2:?./run_all.sh real DATA: the folder of the data sets}" && pwd)
    folder=runs/real
    recipes=$(awk -v name="${3:-}" '!/^#/ && (name ? $1 ~ "^(" name ")$" : !/^paper_/)' \
        .docs/real.txt)
    if [ -z "$recipes" ]; then echo "no recipe of .docs/real.txt is named $3" >&2; exit 1; fi
    rows=$(while read -r name which recipe; do
        awk -v name="$name" -v which="^($which)$" -v recipe="$recipe" '
            $1 ~ which { sub(".*/", name "/", $1); $2 = $2 " " recipe; print }' <<<"$rows"
    done <<<"$recipes") ;;
short)
    folder=runs/short
    rows=$(sed -n '/^# ---/q; /^#/!p' .docs/rows.txt)
    options="--iterations 500" ;;
*)
    sed -n "2,7s/^# //p" run_all.sh >&2
    exit 2 ;;
esac

ready() {  # torchvision's operators fail to load where it does not belong to torch
    "$1" -m pip install --quiet --dry-run --no-index -r requirements.txt &&
        "$1" -c 'import torch, torchvision.ops as o; o.nms(torch.ones(1, 4), torch.ones(1), 0.5)'
} >/dev/null 2>&1
for python in python3 python .venv/bin/python none; do
    if ready "$python"; then break; fi
done
if [ "$python" = none ]; then
    echo "making .venv with the packages of requirements.txt (some minutes, about 6 GB)"
    "${PYTHON:-python3}" -m venv .venv
    python=.venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
if [ "${1:-}" = test ]; then exec "$python" -m pytest -q "${@:2}" tests; fi

export python folder options data
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
train() {  # seed, row, script, options: one that fails stops no other
    shopt -u patsub_replacement 2>/dev/null || true  # a path's & is no more than that
    set -- "${@//DATA/$data}"  # only here, in whole words: the path may hold spaces
    local run="$folder/$2/seed$1"
    mkdir -p "$run"
    "$python" "${@:3}" $options --seed "$1" --output "$run" >"$run/log.txt" 2>&1 ||
        { echo "FAILED $2, seed $1: $(tail -n 1 "$run/log.txt") ($run/log.txt)"; return 1; }
    "$python" -m common.evaluate --table "$folder/${2%/*}" 2>/dev/null
}
export -f train
for name in shapes phantom; do "$python" -m common.synthetic --dataset "$name"; done
status=0
for seed in ${SEEDS:-0}; do sed "s/^/$seed /; s/[[:space:]]*$//" <<<"$rows"; done |
    xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -L 1 bash -c 'train "$@"' train || status=1
for run in "$folder"/*/*/seed*; do "$python" -m common.figures "$run" 2>/dev/null || true; done
if [ -n "${1:-}" ]; then
    for run in "$folder"/*/diffmatch/seed*; do
        "$python" -m common.evaluate --checkpoint "$run/latest.pt" --set steps=1 \
            --output "$run/steps_1.json" >/dev/null 2>&1 || true
    done
    folders=$(sed "s#/.*##; s#^#$folder/#" <<<"$rows" | sort -u)
    "$python" -m common.evaluate --claims $folders || true
fi
echo "pictures:"
ls "$folder"/*/*/seed*/*.png "$folder"/*/*/seed*/*/subclasses.png 2>/dev/null || true
exit $status

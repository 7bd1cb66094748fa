#!/usr/bin/env bash
# Everything that a GPU should show, in one command of under ten minutes:
#
#   bash benchmarks/gpu.sh                        # tests marked gpu, then the suites on CUDA
#   bash benchmarks/gpu.sh --wheels FOLDER        # first installs the wheels in FOLDER, offline
#   bash benchmarks/gpu.sh --device cpu --quick   # the same without a GPU: does it run at all?
#
# Rows (JSON), tables (CSV, log) and plots go to benchmark-results/gpu, or to --output FOLDER.
# What fails or runs out of time is named at the end; the others are run all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

device=cuda output=benchmark-results/gpu wheels='' quick=()
while (($#)); do
  case $1 in
    --device) device=$2 && shift ;;
    --output) output=$2 && shift ;;
    --wheels) wheels=$2 && shift ;;
    --quick) quick=(--quick) ;;
    *) echo "unknown argument $1; there are --device, --output, --wheels, --quick" >&2 && exit 2 ;;
  esac
  shift
done
patience=1
[[ $device == cuda* ]] || patience=10 # the limits are a GPU's
python=${PYTHON:-python3}
mkdir -p "$output"

if [[ $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # --no-deps: torch and its like are the machine's own
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

failed=()
# stage SECONDS NAME COMMAND...: into NAME.log too
stage() {
  local limit=$(($1 * patience)) name=$2 begun=$SECONDS
  shift 2
  printf '\n=== %s  [%d s]\n' "$name" "$SECONDS"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$output/$name.log" || failed+=("$name")
  printf '%s: %d s\n' "$name" $((SECONDS - begun))
}
suite() {
  stage "$1" "$2" "$python" benchmarks/run.py "${@:2}" --device "$device" "${quick[@]}" \
    --json "$output/$2.json" --output "$output"
}

rm -f "$output"/*.json
if [[ $device == cuda* ]]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  # the machine's own libraries may warn of what ours do not
  stage 120 gpu-tests "$python" -m pytest -q -m gpu -W default
fi
suite 60 kernels
suite 240 full-size
suite 170 step
# the embedded model is small: this shows that erasing works on the card, not how fast it is
suite 80 erase --concepts cat --contestants esd_fast --seeds 1

if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}"
  exit 1
fi

#!/usr/bin/env bash
# A newcomer's first hour: 60 photographs, and the commands that the README gives, with no argument that it does not give.
# Says of every step how long it took and how many warnings it gave; fails if a step fails, or gives a warning that
# nobody can act on. FLOWOOD is the command (flowood), PYTHON draws the photographs (python3 with NumPy and Pillow).
#
#   FLOWOOD=.venv/bin/flowood PYTHON=.venv/bin/python tests/first_hour.sh [FOLDER]
set -euo pipefail

FLOWOOD=${FLOWOOD:-flowood}
PYTHON=${PYTHON:-python3}
cd "${1:-$(mktemp -d)}"
CHECKPOINT=results/FeatureMapFlow/OneClass/parts/latest/weights/lightning/model.ckpt
EXPORTED=results/FeatureMapFlow/OneClass/parts/latest/weights/openvino

# What warns, and which warnings say what to do: hold more images out, or give more of them.
WARNING='WARNING|[A-Za-z]*Warning:|^W[0-9]{4} '
ACTIONABLE='held-out normal images the smallest p-value is'
useless=0

step() { # NAME COMMAND...
    local name=$1 begun=${EPOCHREALTIME//[.,]/} tenths all some
    shift
    if ! COLUMNS=10000 "$@" >"$name.log" 2>&1; then
        cat "$name.log"
        echo "first hour: $name failed"
        exit 1
    fi
    tenths=$(((${EPOCHREALTIME//[.,]/} - begun) / 100000))
    all=$(grep -cE "$WARNING" "$name.log" || true)
    some=$(grep -E "$WARNING" "$name.log" | grep -cvE "$ACTIONABLE" || true)
    useless=$((useless + some))
    echo "$name: $((tenths / 10)).$((tenths % 10)) s, warnings: $all, of which nobody can act on: $some"
}

photographs() {
    "$PYTHON" - <<'PYTHON'
from pathlib import Path

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)


def draw(path, number, scratched, mask=None):
    height, width = (120, 160) if number % 2 else (150, 110)  # held upright, or not
    rows, columns = np.mgrid[:height, :width]
    light = 110 + 40 * np.sin(columns / 9 + rng.normal(0, 0.3)) + rng.normal(0, 8, (height, width))
    truth = np.zeros((height, width), bool)
    if scratched:
        top, left = rng.integers(15, 60, 2)
        truth = (np.abs(rows - top - (columns - left) / 2) < 3) & (columns > left) & (columns < left + 45)
        light[truth] += 120
    path.parent.mkdir(parents=True, exist_ok=True)
    if number % 4 == 0:  # a camera of 16 bits
        Image.fromarray((light.clip(0, 255) * 257).astype(np.uint16)).save(path.with_suffix(".png"))
    else:
        image = Image.fromarray(light.clip(0, 255).astype(np.uint8)).convert("RGB")
        image.save(path.with_suffix(".jpg"), quality=100, subsampling=0)
    if mask is not None:
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth).save(mask)


for number in range(44):
    draw(Path(f"parts/good/{number:03}"), number, False)
for number in range(16):
    name = f"scratch/{number:03}"
    draw(Path("parts") / name, number, True, Path(f"parts/ground_truth/{name}_mask.png"))
for number in range(8):
    draw(Path(f"new_images/{number:03}"), number, number > 4)
PYTHON
}

ask() { # ADDRESS IMAGE
    if command -v curl >/dev/null; then
        curl --silent --show-error --fail --data-binary "@$2" "$1"
    else
        "$PYTHON" -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1], open(sys.argv[2], "rb").read()).read())' "$@"
    fi
}

serve() { # starts, is asked once, and is stopped
    $FLOWOOD serve "$EXPORTED" --port 0 >serving.txt 2>&1 &
    local server=$! address=
    trap 'kill "$server" 2>/dev/null || true' EXIT
    while [ -z "$address" ] && kill -0 "$server" 2>/dev/null; do
        sleep 0.2
        address=$(sed -n 's/^Serving .* on \(http:[^ ]*\)\. .*/\1/p' serving.txt)
    done
    [ -n "$address" ] || { cat serving.txt; return 1; }
    ask "$address/score" new_images/006.jpg || { cat serving.txt; return 1; }
    kill -TERM "$server"
    wait "$server" || [ $? = 143 ]
    trap - EXIT
    cat serving.txt
}

step pictures photographs
step train $FLOWOOD train --data ./parts
step test $FLOWOOD test --data ./parts --ckpt_path $CHECKPOINT
step predict $FLOWOOD predict --data ./new_images --ckpt_path $CHECKPOINT
step export $FLOWOOD export --export_type openvino --ckpt_path $CHECKPOINT
step report $FLOWOOD report results/FeatureMapFlow/OneClass/parts/latest
step serve serve

[ "$useless" = 0 ] || { grep -nE "$WARNING" ./*.log | grep -vE "$ACTIONABLE"; exit 1; }

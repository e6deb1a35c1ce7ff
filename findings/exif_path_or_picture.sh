#!/bin/sh
# transformers turns a photo upright when it is given its path, and not when it is given the opened picture.
#
# Versions: transformers 5.23.0, pillow 13.0.0, torch 2.13.0, Python 3.11, CPU; the PIL processor of Llama-3.2-Vision ("Mllama").
# A phone writes pixels as the sensor lies, and an EXIF entry that says how to turn them. A path (or URL) goes through load_image, which
# turns; PIL.Image.open does not, and the processor takes what it gets. So the same file gives tiles of another arrangement and other
# pixels, depending on how it was passed: a data set of paths and a demo of opened pictures show a model different things.
# Output seen (a file of 50 x 20 pixels with orientation 6):
#   path: aspect ratio id 5 (rows, columns (2, 1)); opened: aspect ratio id 2 (rows, columns (1, 2)); same pixels: False
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 transformers==5.23.0 pillow==13.0.0
"$VENV/bin/python" -W ignore - <<'PY'
import sys, tempfile
import numpy as np
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

path = tempfile.mkdtemp() + "/photo.png"
photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (20, 50, 3)).astype(np.uint8))
exif = photo.getexif()
exif[0x0112] = 6  # turn by 90 degrees to be upright
photo.save(path, exif=exif)
processor = MllamaImageProcessorPil(size={"height": 28, "width": 28})
by_path, opened = (processor(given, return_tensors="np") for given in (path, Image.open(path)))
ids = [int(made["aspect_ratio_ids"][0, 0]) for made in (by_path, opened)]
shapes = {2: (1, 2), 5: (2, 1)}
same = np.array_equal(by_path["pixel_values"], opened["pixel_values"])
print(f"path: aspect ratio id {ids[0]} (rows, columns {shapes.get(ids[0])}); opened: aspect ratio id {ids[1]} (rows, columns "
      f"{shapes.get(ids[1])}); same pixels: {same}")
good = ids == [5, 2] and not same
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

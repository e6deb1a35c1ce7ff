#!/bin/sh
# A call of a transformers tokenizer is saved with it: tokenizer.json then cuts, or fills up, every text of other programs.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3, Python 3.11.
# truncation=True, max_length=3 in one call sets the truncation of the Rust tokenizer inside, and the next save_pretrained writes it
# into tokenizer.json. transformers itself switches it off again in the next call, so nobody notices there; tokenizers.Tokenizer, and
# whatever is built on it, obeys the file: prompts lose their ends without a word. Padding goes the same way. Whether the file holds it
# depends only on the last call before the save (in a trainer: on the collator).
# Output seen:
#   after a plain call     truncation None, padding None -> [0, 1, 2, 3, 4]
#   after truncation=True  truncation 3, padding None -> [0, 1, 2]
#   after max_length=7     truncation None, padding 7 -> [0, 1, 2, 3, 4, 8, 8]
#   transformers reads all three as [0, 1, 2, 3, 4]
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
"$VENV/bin/python" -W ignore - <<'PY'
import json, sys, tempfile
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

raw = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefgh")} | {"[PAD]": 8}, unk_token="[PAD]"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]")
calls = {"a plain call": {}, "truncation=True": {"truncation": True, "max_length": 3},
         "max_length=7": {"padding": "max_length", "max_length": 7}}
ids, again = [], []
for title, options in calls.items():
    folder = tempfile.mkdtemp()
    tokenizer("a b c d", **options)
    tokenizer.save_pretrained(folder)
    saved = json.loads(Path(folder, "tokenizer.json").read_text())
    cut, fill = saved["truncation"], saved["padding"]
    ids.append(Tokenizer.from_file(folder + "/tokenizer.json").encode("a b c d e").ids)
    again.append(PreTrainedTokenizerFast.from_pretrained(folder)("a b c d e").input_ids)
    print(f"after {title:16} truncation {cut and cut['max_length']}, padding {fill and fill['strategy']['Fixed']} -> {ids[-1]}")
print("transformers reads all three as", again[0])
good = ids == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 3, 4, 8, 8]] and again == [[0, 1, 2, 3, 4]] * 3
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

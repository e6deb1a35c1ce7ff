#!/bin/sh
# Meta's llama-models and the hub's chat template give a message that begins with a line break different ids.
#
# Versions: llama-models 0.3.0, tiktoken 0.14.0, pillow 13.0.0, Python 3.11.
# The two line breaks behind a header and the text are encoded apart by ChatFormat. A chat template is one text, encoded whole: line
# breaks there belong together ("\n\n\n" is a token of its own). Both decode to the same text. Behind a picture, whose token stands
# between, both are the same.
# Output seen (of the message's ids behind the header's end):
#   'x': apart [271, 87], whole [271, 87]
#   '\nx': apart [271, 198, 87], whole [1432, 87]
#   '\n\nx': apart [271, 271, 87], whole [1038, 87]
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q llama-models==0.3.0 pillow==13.0.0
"$VENV/bin/python" -W ignore - <<'PY'
import sys
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer

tokenizer, seen = Tokenizer.get_instance(), []
for text in ("x", "\nx", "\n\nx"):
    ids, _ = ChatFormat(tokenizer).encode_message(RawMessage(role="user", content=text), None)
    whole = tokenizer.encode(f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>", bos=False, eos=False, allowed_special="all")
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    print(f"{text!r}: apart {ids[3:-1]}, whole {whole[3:-1]}")
    seen.append(ids == whole)
good = seen == [True, False, False]
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

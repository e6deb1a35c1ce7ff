#!/bin/sh
# In Meta's llama-models an answer to a prompt with two pictures sees none of them after its first token; with one picture it does.
#
# Versions: llama-models 0.3.0, tiktoken 0.14.0, torch 2.13.0, torchvision 0.28.0, fairscale 0.4.13, Python 3.11, CPU.
# ChatFormat says for each picture which tokens see it: from its place to -1, "to the end", if it is the only one; with several, the last
# one's end is the length of the prompt. Generation makes the masks for prompt and answer together, where -1 becomes the whole length,
# but the number stays. So tokens of the answer lie behind the end of all pictures: their rows of the cross-attention mask are empty,
# and cross layers add nothing to them. (transformers repeats the prompt's last row for each new token.)
# Output seen:
#   1 picture(s): 13 ids, spans [[5, -1]]: pictures that prompt's last token sees 1, answer's 8 tokens see [1, 1, 1, 1, 1, 1, 1, 1]
#   2 picture(s): 14 ids, spans [[5, 14], [6, 14]]: pictures that prompt's last token sees 2, answer's 8 tokens see [0, 0, 0, 0, 0, 0, 0, 0]
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 torchvision==0.28.0 llama-models==0.3.0 fairscale==0.4.13 pillow==13.0.0
"$VENV/bin/python" -W ignore - <<'PY'
import io, sys
import torch
try:
    import torchvision
except RuntimeError:  # beside a torch for CPUs the index's torchvision lacks operators that nothing here uses
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from PIL import Image
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.multimodal.model import _pad_masks
from llama_models.llama3.tokenizer import Tokenizer

file = io.BytesIO()
Image.new("RGB", (20, 20)).save(file, "PNG")
chat, good = ChatFormat(Tokenizer.get_instance()), True
for count in (1, 2):
    pictures = [RawMediaItem(data=io.BytesIO(file.getvalue())) for _ in range(count)]
    made = chat.encode_dialog_prompt([RawMessage(role="user", content=[*pictures, RawTextItem(text="Describe.")])])
    length, spans = len(made.tokens), [list(span) for span in made.vision.mask]
    mask = _pad_masks([made.vision.mask], [[4] * count], length + 8, 4)  # as compute_vision_tokens_masks calls it: total_len of both
    sees = (mask[0] == 0).any(-1).sum(-1).tolist()  # pictures of each token
    print(f"{count} picture(s): {length} ids, spans {spans}: pictures that prompt's last token sees {sees[length - 1]}, "
          f"answer's 8 tokens see {sees[length:]}")
    good &= sees[length - 1] == count and sees[length:] == [1 if count == 1 else 0] * 8
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

#!/bin/sh
# A tokenizer that cuts a long chat on the left marks none of the answers that are left; a processor around it marks them all.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, pillow 13.0.0, Python 3.11, CPU.
# apply_chat_template(return_assistant_tokens_mask=True) says which tokens are the assistant's, to train on those alone. With
# truncation_side="left" (keep the newest turns) the first answer may lose its beginning. The tokenizer then stops looking: every later
# answer, though whole and in the ids, has mask 0, and the row gives no loss. No warning. From where the cut reaches the first answer,
# rows turn silent, so the longest chats teach nothing. A processor has code of its own for this, and marks the same ids right.
# Output seen (A begins an answer, of which the text and the point are to be marked):
#   18 left  A1x.U2xA2x.U3xA3x.  tokenizer 011100001110000111  processor 011100001110000111
#   16 left  x.U2xA2x.U3xA3x.    tokenizer 0000000000000000    processor 1100001110000111
#   12 left  xA2x.U3xA3x.        tokenizer 000000000000        processor 001110000111
#   16 right BU1xA1x.U2xA2x.U    tokenizer 0000011100001110    processor 0000011100001110
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 pillow==13.0.0
"$VENV/bin/python" -W ignore - <<'PY'
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor

WORDS = ["<pad>", "<|image|>", *"BUA123x."]
TEMPLATE = ("B{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}"
            "{% else %}A{% generation %}{{ m.content }}.{% endgeneration %}{% endif %}{% endfor %}")
CHAT = [{"role": role, "content": turn + "x"} for turn in "123" for role in ("user", "assistant")]


def marks(side, length):
    """The text that is left, the tokenizer's mask and the processor's, as strings."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="B", pad_token="<pad>", chat_template=TEMPLATE,
                                        truncation_side=side, additional_special_tokens=["<|image|>"])
    processor = MllamaProcessor(MllamaImageProcessorPil(), tokenizer, chat_template=TEMPLATE)
    cut = {"truncation": True, "max_length": length}
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    one = tokenizer.apply_chat_template([CHAT], **asked, **cut)
    other = processor.apply_chat_template([CHAT], **asked, processor_kwargs=cut)
    assert one["input_ids"][0] == other["input_ids"][0]
    text = "".join(tokenizer.convert_ids_to_tokens(one["input_ids"][0]))
    return text, *("".join(str(int(mark)) for mark in out["assistant_masks"][0]) for out in (one, other))


seen = {case: marks(*case) for case in (("left", 18), ("left", 16), ("left", 12), ("right", 16))}
for (side, length), (text, one, other) in seen.items():
    print(f"{length} {side:5} {text:18}  tokenizer {one:18}  processor {other}")
good = all((one == other) != (case in [("left", 16), ("left", 12)]) for case, (_, one, other) in seen.items())
good &= not any("1" in seen["left", length][1] for length in (16, 12)) and seen["left", 12][2] == "001110000111"
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

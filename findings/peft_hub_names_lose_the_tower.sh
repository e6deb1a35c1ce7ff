#!/bin/sh
# PEFT loads half of a Llama-3.2-Vision adapter whose tensors have the hub's module names.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
# An adapter of q_proj and v_proj lies on the decoder and on the vision tower, whose layers have the same names. Its tensors are named
# as the hub names the modules of this model (language_model.model.layers..., vision_model...), which is how
# transformers writes the model itself. PEFT renames those of the decoder on loading, not those of the tower: they keep their fresh
# values (B = 0, so no adapter), with a warning about missing keys.
# Logits of text alone are exact, so a check without pictures passes; logits with a picture are off.
# Output seen:
#   today's names: decoder 12 of 12 tensors, tower 12 of 12; logits off by 0.00 (text), 0.00 (picture)
#   the hub's names: decoder 12 of 12 tensors, tower 0 of 12; logits off by 0.00 (text), 0.23 (picture)
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$VENV/bin/python" -W ignore - <<'PY'
import sys, tempfile
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MllamaConfig, MllamaForConditionalGeneration

ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            cross_attention_layers=[1], pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128)
vision = dict(hidden_size=24, attention_heads=2, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, patch_size=4,
              image_size=12, intermediate_layers_indices=[0, 1], vision_output_dim=72, supported_aspect_ratios=ratios)
torch.manual_seed(0)
model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_index=64))
with torch.no_grad():  # gates open, nothing zero
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.2)
folder = tempfile.mkdtemp()
model.save_pretrained(folder + "/base")
from pathlib import Path
from safetensors.torch import load_file, save_file


def fresh():
    return MllamaForConditionalGeneration.from_pretrained(folder + "/base").eval()


@torch.no_grad()
def logits(model):
    tiles = torch.randn(1, 1, 4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[[1, 1, 1, 0]]])
    shown = model(input_ids=torch.tensor([[1, 64, 6, 7, 8]]), pixel_values=tiles, aspect_ratio_ids=torch.tensor([[7]]),
                  aspect_ratio_mask=mask, cross_attention_mask=mask[:, None].expand(1, 5, 1, 4))
    return model(input_ids=torch.tensor([[1, 5, 6, 7, 8]])).logits, shown.logits


torch.manual_seed(2)
adapted = get_peft_model(fresh(), LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])).eval()
with torch.no_grad():  # as if it had been trained
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
adapted.save_pretrained(folder + "/today")
saved = load_file(folder + "/today/adapter_model.safetensors")
layouts = ("model.model.language_model.", "model.language_model.model."), ("model.model.vision_model.", "model.vision_model.")
old = {name.replace(*layouts[0]).replace(*layouts[1]): tensor for name, tensor in saved.items()}
Path(folder, "hub").mkdir()
Path(folder, "hub/adapter_config.json").write_text(Path(folder, "today/adapter_config.json").read_text())
save_file(old, folder + "/hub/adapter_model.safetensors", metadata={"format": "pt"})
seen = []
for title, where in (("today's names", "/today"), ("the hub's names", "/hub")):
    loaded = PeftModel.from_pretrained(fresh(), folder + where).eval()
    there = dict(loaded.named_parameters())
    equal = {name: torch.equal(there[name.replace(".weight", ".default.weight")], tensor) for name, tensor in saved.items()}
    parts = [[ok for name, ok in equal.items() if part in name] for part in ("language_model", "vision_model")]
    off = [(a - b).abs().max().item() for a, b in zip(logits(loaded), logits(adapted))]
    print(f"{title}: decoder {sum(parts[0])} of {len(parts[0])} tensors, tower {sum(parts[1])} of {len(parts[1])}; "
          f"logits off by {off[0]:.2f} (text), {off[1]:.2f} (picture)")
    seen.append((all(parts[0]), any(parts[1]), off[0] < 1e-5, off[1] < 1e-5))
good = seen == [(True, True, True, True), (True, False, True, False)]
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

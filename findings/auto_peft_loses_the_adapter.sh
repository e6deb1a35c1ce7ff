#!/bin/sh
# AutoPeftModelForCausalLM opens a Llama-3.2-Vision adapter as the bare base without its eyes.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
# task_type="CAUSAL_LM" is what most recipes give for this model too, and PEFT saves it. The class that goes with it,
# AutoPeftModelForCausalLM, then reads the same folder: it opens the base as MllamaForCausalLM, the decoder alone, whose modules are
# called model.layers, not model.language_model.layers. No tensor of the adapter finds its module. What comes back is a PeftModel with
# its adapter "active" and logits equal to those of the base. There is a warning about missing keys, and no error.
# Output seen:
#   opened as MllamaForCausalLM, vision tower: False, active adapter: default
#   logits off the adapted model's by 5.36, off the base's by 0.00
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$VENV/bin/python" -W ignore - <<'PY'
import sys, tempfile
import torch
from peft import LoraConfig, PeftModel, get_peft_model, AutoPeftModelForCausalLM
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


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[1, 5, 6, 7, 8]])).logits


base = MllamaForConditionalGeneration.from_pretrained(folder + "/base").eval()
without = logits(base)
adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).eval()
with torch.no_grad():  # as if it had been trained
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(3))
adapted.save_pretrained(folder + "/adapter")
opened = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter").eval()
kind, tower = type(opened.get_base_model()).__name__, any("vision" in name for name, _ in opened.named_modules())
off = [(logits(opened) - other).abs().max().item() for other in (logits(adapted), without)]
print(f"opened as {kind}, vision tower: {tower}, active adapter: {opened.active_adapter}")
print(f"logits off the adapted model's by {off[0]:.2f}, off the base's by {off[1]:.2f}")
good = kind == "MllamaForCausalLM" and not tower and off[0] > 0.1 and off[1] < 1e-4
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

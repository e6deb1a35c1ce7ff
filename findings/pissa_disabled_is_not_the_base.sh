#!/bin/sh
# Under PiSSA and OLoRA a disabled adapter does not give the base model, so a reference policy made that way is another model.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
# RL and preference trainers (TRL's GRPO and DPO among them) save the memory of a reference model by disable_adapter(): the base is the
# policy before training (unless there is an adapter named "ref"). PiSSA and OLoRA move a part of each weight into A and B when they
# begin, and leave the rest in the module. The model is unchanged at that moment, but with the adapter disabled, or unloaded, only the
# rest is computed, and nothing says so. A KL penalty is then one towards a damaged model: it is not zero before the first step.
# Output seen:
#   True: before training |adapter on - base| 0.00, |adapter off - base| 0.00, KL of on from off 0.00 nats
#   pissa: before training |adapter on - base| 0.00, |adapter off - base| 7.27, KL of on from off 1.80 nats
#   olora: before training |adapter on - base| 0.00, |adapter off - base| 7.05, KL of on from off 1.81 nats
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$VENV/bin/python" -W ignore - <<'PY'
import sys, tempfile
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
folder = tempfile.mkdtemp()
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, initializer_range=0.3)).save_pretrained(folder + "/base")


def base():
    return LlamaForCausalLM.from_pretrained(folder + "/base").eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[1, 5, 6, 7, 8]])).logits


def away(a, b):
    return (a - b).abs().max().item()


good, want = True, logits(base())
for start in (True, "pissa", "olora"):
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=start)).eval()
    on = logits(model)
    with model.disable_adapter():
        off = logits(model)
    p, q = on.log_softmax(-1), off.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    print(f"{start}: before training |adapter on - base| {away(on, want):.2f}, |adapter off - base| {away(off, want):.2f}, "
          f"KL of on from off {kl:.2f} nats")
    good &= away(on, want) < 1e-3 and (away(off, want) < 1e-3) == (start is True)
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

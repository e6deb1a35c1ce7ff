#!/bin/sh
# torchtune's vision encoder of Llama 3.2 gives a small picture other features beside a large one than alone.
#
# Versions: torchtune 0.6.1, torchao 0.9.0, torch 2.14.1, torchvision 0.29.1, Python 3.11, CPU.
# A picture has one to four tiles. torchtune's collate function fills a batch up to the picture with most tiles, and marks the filling in
# the mask of the cross attention alone: the encoder itself has no mask, so real patches attend to the empty tiles, in the CLIP layers
# and in the projection head. The features of a picture then depend on what else is in its batch, and a step with micro-batches
# is another one than a step with the whole batch. (Meta's code and transformers mask the empty tiles.)
# Output seen, random weights (largest difference of a feature of the picture's own tile):
#   one tile beside one tile    0.00
#   one tile beside four tiles  3.61
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 torchao==0.9.0 torchtune==0.6.1
"$VENV/bin/python" -W ignore - <<'PY'
import sys
import torch
from torchtune.data import padded_collate_tiled_images_and_mask
from torchtune.models.llama3_2_vision import llama3_2_vision_encoder

torch.manual_seed(0)
encoder = llama3_2_vision_encoder(patch_size=4, num_heads=2, clip_embed_dim=16, clip_num_layers=2, clip_hidden_states=[0],
                                  num_layers_projection=1, decoder_embed_dim=32, tile_size=16).eval()
with torch.no_grad():
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
PATCHES = 17  # of a tile: 4 x 4 and the class token


def sample(tiles, shape):
    return {"tokens": [1, 2], "labels": [1, 2], "encoder_mask": [torch.ones(2, len(tiles) * PATCHES, dtype=torch.bool)],
            "encoder_input": {"images": [tiles], "aspect_ratio": [torch.tensor(shape)]}}


@torch.no_grad()
def features(*samples):
    batch = padded_collate_tiled_images_and_mask(list(samples), padding_idx=0)
    return encoder(**batch["encoder_input"])[0, :PATCHES]


small, twin, large = (torch.randn(count, 3, 16, 16) for count in (1, 1, 4))
alone = features(sample(small, [1, 1]))
off = {"one tile": (features(sample(small, [1, 1]), sample(twin, [1, 1])) - alone).abs().max().item(),
       "four tiles": (features(sample(small, [1, 1]), sample(large, [2, 2])) - alone).abs().max().item()}
for name, value in off.items():
    print(f"one tile beside {name:10}  {value:.2f}")
good = off["one tile"] < 1e-4 and off["four tiles"] > 0.1
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY

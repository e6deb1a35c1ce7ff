"""Reference numbers from transformers for tests/test_exact.py, and the small models and batches they belong to.

Made with transformers 5.23.0 (torch 2.13.0, CPU, eager attention), in a virtual environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 pillow==13.0.0 tokenizers safetensors && python tests/make_fixtures.py

The two patches that make transformers compute what Meta's reference code does (semantics "meta"; without them "hf"):
  1. vision taps are the inputs of the named layers: the indices are passed one lower;
  2. a token that sees no image gets nothing from a cross layer: the attention's output is multiplied by 0 there as well.
Attention is eager, and the cross-attention mask is always passed: under sdpa without it transformers turns causal.
check_llama_models.py compares the "meta" fixtures with Meta's own code, which is why weights and RoPE are such as it can have.

Weights and inputs come from numpy's frozen RandomState, so that the fixtures hold results only.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model as M  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
VOCAB, PAD = 50, 0
IMAGE = VOCAB  # the first id behind lm_head

# name: (config, seed, rows of text as strings: one letter a token, "i" = <|image|>; the ratio ids of each row's images)
TEXT = M.TextConfig(VOCAB, 32, 48, 5, 4, 2, (1, 2, 4), rope_theta=100.0, rope_factor=8.0, rope_original=32)
VISION = M.VisionConfig(24, 2, 40, 5, 2, 4, 12, 4, (1, 2, 4))
CASES = {
    # grouped heads; cross layers adjacent and last; consecutive, several, missing images; a text-only row
    "grouped": (M.Config(TEXT, VISION), 1, ["btiittttittt", "bttttttt", "btitttttitt", "bitttttttttt"], [[2, 6, 5], [], [8, 4], [7]]),
    # plain heads; cross layers first, adjacent and last; 17 tokens a tile; at most one image a row
    "plain": (M.Config(replace(TEXT, num_key_value_heads=4, cross_attention_layers=(0, 3, 4)),
                       replace(VISION, image_size=16, intermediate_layers_indices=(1, 3))), 2,
              ["btitttttt", "bittttttttt", "bttttitt", "bttt"], [[1], [3], [6], []]),
    # runs of images at the very start, and text only; a single cross layer; plain RoPE
    "runs": (M.Config(replace(TEXT, cross_attention_layers=(3,), rope_factor=1.0), VISION), 3,
             ["iiiittttt", "iittit", "tttt"], [[1, 2, 3, 4], [5, 6, 7], []]),
}


def random_weights(shapes, seed):
    """name -> float32 tensor for name -> shape: nothing zero, no gate closed, no norm or bias trivial."""
    random, out = np.random.RandomState(seed), {}
    for name, shape in sorted(shapes.items()):
        noise = random.standard_normal(shape)
        last = name.rsplit(".", 2)[-2:]
        if "gate" in last[-1]:
            noise = 0.7 + 0.5 * np.tanh(noise)
        elif "norm" in name and last[-1] == "weight":
            noise = 1 + 0.3 * noise
        elif last[-1] == "bias" or "embed" in name and "patch" not in name:
            noise = 0.4 * noise
        else:
            noise = noise * 1.2 / np.sqrt(np.prod(shape[1:]))
        if name.endswith("embedding.weight") and shape[0] == 9:
            noise = corners(random.standard_normal((4, 4, shape[1] // 4)) * 0.4)
        out[name] = torch.tensor(noise, dtype=torch.float32)
    return out


def corners(table):
    """What a published checkpoint has for each aspect ratio id, (9, 4 * N), of Meta's table of tiles by row and column (4, 4, N):
    its corner, row by row; zeros for tiles that are not there, and for id 0."""
    rows = [table[:r, :c].reshape(r * c, -1) for r, c in M.RATIOS]
    return np.stack([np.pad(row, ((0, 4 - len(row)), (0, 0))).reshape(-1) for row in [table[0, :0], *rows]])


def batch(name):
    """ids (B, T) padded on the right, lengths (B,), chosen (B, T), tiles (B, I, 4, 3, R, R), ratio_ids (B, I)."""
    config, seed, texts, images = CASES[name]
    random, size = np.random.RandomState(seed + 100), config.vision.image_size
    rows = [[IMAGE if c == "i" else random.randint(1, VOCAB) for c in text] for text in texts]
    ids, lengths = M.pad_rows(rows, PAD, "cpu")
    ratio_ids = torch.tensor([r + [0] * (max(map(len, images)) - len(r)) for r in images])
    tiles = torch.zeros(*ratio_ids.shape, 4, 3, size, size)
    for b, i in ratio_ids.nonzero().tolist():
        n = np.prod(M.RATIOS[ratio_ids[b, i] - 1])
        tiles[b, i, :n] = torch.tensor(random.standard_normal((n, 3, size, size)), dtype=torch.float32)
    chosen = (torch.arange(ids.shape[1]) < lengths[:, None]) & (ids != IMAGE)
    chosen[:, 0] = False
    return ids, lengths, chosen, tiles, ratio_ids


def pad_left(rows, pad):
    """M.pad_rows with the padding on the left."""
    ids, lengths = M.pad_rows([row[::-1] for row in rows], pad, "cpu")
    return ids.flip(1), lengths


def masked_forward(model, ids, real, image=None):
    """LlamaVision.forward for rows with padding anywhere; real (B, T) bool marks the other tokens. Padding sees itself: a row
    of scores that are all -inf would be NaN."""
    positions = (real.cumsum(1) - 1).clamp(min=0)
    mask = real[:, None, :].expand(-1, ids.shape[1], -1).tril() | torch.eye(ids.shape[1], dtype=torch.bool)
    return model.language_model.model(ids, positions, mask[:, None], image)


# Pictures for preprocessing: (width, height, tile)
SIZES = [(1, 1, 560), (4000, 10, 560), (10, 4000, 560), (560, 560, 560), (561, 560, 560), (600, 600, 560), (1200, 1200, 560),
         (333, 777, 560), (1119, 561, 448), (2000, 1500, 448), (1, 300, 448), (5, 2, 448)]
SIZES += [(int(w), int(h), 28) for w, h in np.random.RandomState(0).randint(1, 150, (120, 2))]
SIZES += [(28 * a + d, 28 * b + e, 28) for a in (1, 2, 3, 4) for b in (1, 2, 3, 4) for d in (-1, 0, 1) for e in (-1, 0, 1)]


def picture(width, height):
    """A random 8-bit RGB array (height, width, 3): noise over a slope, so that no two places look alike."""
    random = np.random.RandomState(width * 5000 + height)
    slope = np.linspace(0, 180, height)[:, None, None] * np.array([1, 0.5, 0.2]) + np.linspace(0, 60, width)[None, :, None]
    return (slope + random.randint(0, 75, (height, width, 3))).clip(0, 255).astype(np.uint8)


def digest(tiles, ratio_id):
    """A short hash of float32 tiles and the id of their arrangement."""
    data = np.ascontiguousarray(tiles, np.float32).tobytes() + bytes([int(ratio_id)])
    return hashlib.sha256(data).hexdigest()[:20]


# ---------------------------------------------------------------- the oracle


def oracle(config, seed, semantics):
    """transformers' model with the weights of `seed`, patched for semantics "meta"."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    data = json.loads(json.dumps(M.config_to_json(config)))
    if semantics == "meta":  # patch 1
        taps = data["vision_config"]["intermediate_layers_indices"]
        data["vision_config"]["intermediate_layers_indices"] = [i - 1 for i in taps]
    data["vision_config"]["supported_aspect_ratios"] = [list(r) for r in M.RATIOS]
    data["text_config"] |= {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    hf = MllamaForConditionalGeneration._from_config(MllamaConfig(**data), attn_implementation="eager")
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in M.LlamaVision(config).state_dict().items()}
    state = random_weights(shapes, seed)
    hf.load_state_dict({hf_name(k): v for k, v in state.items()}, strict=True)
    if semantics == "meta":  # patch 2
        for layer in hf.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                layer.register_forward_pre_hook(keep_rows, with_kwargs=True)
                layer.cross_attn.register_forward_hook(
                    lambda attn, args, out, layer=layer: (out[0] * layer.seeing_rows, *out[1:]))
    return hf.eval()


def hf_name(name):
    """The hub's tensor name as transformers >= 4.52 has it in memory."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return name.removeprefix("language_model.") if "lm_head" in name else "model." + name


def keep_rows(layer, args, kwargs):
    layer.seeing_rows = kwargs["full_text_row_masked_out_mask"][:, 0]  # (B, T, 1)


def inputs(ids, lengths, tiles, ratio_ids, side="right"):
    """transformers' arguments, masks built by its own processor's functions."""
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense, get_cross_attention_token_mask)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    if side == "left":
        rows = [row[:n].tolist() for row, n in zip(ids, lengths)]
        ids, real = pad_left(rows, PAD)[0], real.flip(1)
    counts = torch.tensor([0] + [r * c for r, c in M.RATIOS])[ratio_ids]
    sparse = [get_cross_attention_token_mask(row.tolist(), IMAGE) for row in ids]
    dense = convert_sparse_cross_attention_mask_to_dense(sparse, counts.tolist(), 4, ids.shape[1])
    dense = torch.nn.functional.pad(torch.tensor(dense), (0, 0, 0, ratio_ids.shape[1] - dense.shape[2]))
    return {"input_ids": ids, "attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0),
            "pixel_values": tiles, "aspect_ratio_ids": ratio_ids, "cross_attention_mask": dense,
            "aspect_ratio_mask": (torch.arange(4) < counts.clamp(min=1)[..., None]).long()}


def greedy(hf, row, tiles, ratio_ids, count):
    """The likeliest continuation of one row, everything computed anew for each token."""
    row, start = row.tolist(), len(row)
    while len(row) < start + count:
        ids = torch.tensor([row])
        if (ratio_ids > 0).any():
            logits = hf(**inputs(ids, torch.tensor([len(row)]), tiles[None], ratio_ids[None])).logits
        else:
            logits = hf(input_ids=ids).logits
        row.append(int(logits[0, -1].argmax()))
    return row[start:]


def reference(name, semantics):
    """Everything that the tests compare, for one case."""
    config, seed, _, _ = CASES[name]
    ids, lengths, chosen, tiles, ratio_ids = batch(name)
    hf, out, seen = oracle(config, seed, semantics), {}, {}
    hf.model.vision_model.register_forward_hook(lambda m, a, o: seen.update(features=o[0]))
    hf.model.multi_modal_projector.register_forward_hook(lambda m, a, o: seen.update(states=o))
    result = hf(**inputs(ids, lengths, tiles, ratio_ids), labels=ids.masked_fill(~chosen, -100))
    result.loss.backward()
    out["logits"], out["loss"] = result.logits, result.loss
    out["features"], out["states"] = seen["features"], seen["states"].view(*ratio_ids.shape, -1, config.text.hidden_size)
    from_left = hf(**inputs(ids, lengths, tiles, ratio_ids, "left")).logits
    for b, n in enumerate(lengths):
        assert (from_left[b, -n:] - result.logits[b, :n]).abs().max() < 1e-4
    if semantics == "meta":
        with torch.no_grad():
            out["greedy"] = torch.tensor([greedy(hf, ids[b, :n], tiles[b], ratio_ids[b], 8) for b, n in enumerate(lengths)])
            if 0 not in config.text.cross_attention_layers:  # transformers reads the text's length off its layer 0
                given = inputs(ids, lengths, tiles, ratio_ids, "left")
                del given["position_ids"]
                made = hf.generate(**given, do_sample=False, max_new_tokens=8, min_new_tokens=8, eos_token_id=None)[:, -8:]
                assert torch.equal(made, out["greedy"])
        gradients = {n: p.grad for n, p in hf.named_parameters()}
        with torch.device("meta"):
            names = [n for n, _ in M.LlamaVision(config).named_parameters()]
        out |= {f"grad {n}": gradients[hf_name(n)] for n in names}
    return {k: v.detach().numpy() for k, v in out.items()}


@torch.no_grad()
def bf16_error(name, seed):
    """Root mean square of logits in bf16 minus logits in float32, over the real tokens."""
    ids, lengths, _, tiles, ratio_ids = batch(name)
    hf = oracle(CASES[name][0], seed, "meta")
    given = inputs(ids, lengths, tiles, ratio_ids)
    exact, rounded = hf(**given).logits, hf.to(torch.bfloat16)(**given).logits.float()
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    return (exact - rounded)[real].square().mean().sqrt().item()


def picture_digests():
    """What transformers' PIL processor makes of the pictures, with the checkpoint's preprocessor_config.json."""
    from PIL import Image
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    out = []
    for width, height, tile in SIZES:
        processor = MllamaImageProcessorPil(size={"height": tile, "width": tile}, image_mean=M.MEAN, image_std=M.STD)
        made = processor(Image.fromarray(picture(width, height)), return_tensors="np")
        out.append(digest(made["pixel_values"][0, 0, : made["num_tiles"][0][0]], made["aspect_ratio_ids"][0, 0]))
    return np.array(out)


def main():
    import transformers
    assert transformers.__version__ == "5.23.0", "the fixtures are those of transformers 5.23.0"
    torch.set_num_threads(1)
    FIXTURES.mkdir(exist_ok=True)
    for name in CASES:
        for semantics in ("meta", "hf"):
            np.savez_compressed(FIXTURES / f"{name}-{semantics}.npz", **reference(name, semantics))
    np.savez_compressed(FIXTURES / "rest.npz", pictures=picture_digests(),
                        bf16=np.array([bf16_error("grouped", 10 + seed) for seed in range(8)]))
    for path in sorted(FIXTURES.iterdir()):
        print(f"{path.stat().st_size:>9,} {path.name}")


if __name__ == "__main__":
    main()

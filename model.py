"""Llama-3.2-Vision by hand: one set of classes for `tiny` (two CPU cores), `small` and the real `11b`.

Contents
  1. Configuration        the hub's config.json, the three sizes
  2. Linear and LoRA      y = W x + (alpha / rank) B A x
  3. Text decoder         self-attention layers, and gated cross-attention layers that look at the image
  4. Vision tower         tiles -> patches -> local and global layers -> six stacked feature maps
  5. Images               any picture -> 8-bit RGB -> a canvas of up to four tiles
  6. The whole model      forward, logits, log-probabilities of chosen tokens
  7. Cache and generation static KV cache, prompts shared by a group, per-row stopping
  8. Tokenizer and chat   text never becomes a special token
  9. Loading and saving   safetensors and names as on the hub, adapters as PEFT writes them
 10. Cost                 parameters, FLOPs and memory
 11. Command line         the dry run: what a size takes, without taking it

Shapes: B rows, T new tokens, S cache slots, D hidden, H query heads, K key/value heads, E head size, V vocabulary,
R sets of I images, M tile slots of an image, L pixels of a tile's side, P tokens of a tile, C hidden size of the tower,
N image tokens of a set.
Module names are the hub's (`language_model.model.layers.0.self_attn.q_proj.weight`), so a checkpoint loads with
`load_state_dict(strict=True)`. Where Meta's code and transformers differ, the default is Meta's semantics.
"""

import argparse
import io
import json
import math
import os
import sys
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

# ---------------------------------------------------------------- 1. Configuration


@dataclass(frozen=True)
class TextConfig:
    """The decoder. The defaults are those of the 11B; names are those of the hub's `text_config`."""

    vocab_size: int = 128256  # rows of lm_head; the embedding has 8 more, the first of them is <|image|>
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    cross_attention_layers: tuple = (3, 8, 13, 18, 23, 28, 33, 38)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 8.0  # 1.0 = plain RoPE; else the "llama3" stretching of low frequencies
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original: int = 8192

    @property
    def head_dim(self):
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """The tower. The defaults are those of the 11B Instruct; names are those of the hub's `vision_config`."""

    hidden_size: int = 1280
    attention_heads: int = 16
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    patch_size: int = 14
    image_size: int = 560
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple = (3, 7, 15, 23, 30)
    norm_eps: float = 1e-5

    @property
    def tokens(self):
        """Tokens of one tile: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def output_dim(self):
        """Features of one image token: the final state and the tapped ones."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


@dataclass(frozen=True)
class Config:
    """The whole model.

    vision_taps: "input" (Meta: a tapped state is what enters the named layer) or "output" (transformers >= 4.56).
    mask_prefix_attention: True (Meta: a token that sees no image gets nothing from a cross layer) or False
    (transformers: such a token still gets the attention output).
    """

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    vision_taps: str = "input"
    mask_prefix_attention: bool = True


SIZES = {
    "tiny": Config(
        TextConfig(480, 128, 256, 5, 4, 2, (3,), rope_theta=10000.0, rope_factor=1.0),
        VisionConfig(96, 4, 288, 4, 1, 8, 32, 4, (1, 2)),
    ),
    "small": Config(
        TextConfig(4096, 768, 2048, 12, 12, 4, (2, 6, 10), rope_theta=10000.0, rope_factor=1.0),
        VisionConfig(384, 6, 1536, 8, 2, 14, 112, 4, (2, 4, 6)),
    ),
    "11b": Config(),
}


def config_to_json(config):
    """The hub's config.json as a dict: what transformers' MllamaConfig reads."""
    text, vision = asdict(config.text), asdict(config.vision)
    factor, low, high, original = (text.pop(f"rope_{k}") for k in ("factor", "low", "high", "original"))
    scaling = {"rope_type": "default"}
    if factor != 1.0:
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                   "original_max_position_embeddings": original}
    text |= {"model_type": "mllama_text_model", "rope_scaling": scaling, "hidden_act": "silu"}
    vision |= {"model_type": "mllama_vision_model", "vision_output_dim": config.vision.output_dim}
    return {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"],
            "image_token_index": config.text.vocab_size, "text_config": text, "vision_config": vision,
            "vision_taps": config.vision_taps, "mask_prefix_attention": config.mask_prefix_attention}


def config_from_json(data):
    """Config from the hub's config.json (a dict), old and new layout of the RoPE entries; only known fields are read.

    What the file leaves out has transformers' default (so 448 px). Raises ValueError with one sentence when it is not a
    config of this architecture, asks for something that is not built here, or holds a number that is out of range.
    """
    if not isinstance(data, dict) or data.get("model_type") != "mllama":
        raise ValueError("config.json does not describe a Llama-3.2-Vision model (model_type must be \"mllama\").")
    parts = [data.get(f"{part}_config") for part in ("text", "vision")]
    rope = parts[0] and isinstance(parts[0], dict) and (parts[0].get("rope_parameters") or parts[0].get("rope_scaling"))
    if not all(isinstance(part, dict) for part in (*parts, rope or {})):
        raise ValueError("config.json: text_config, vision_config and the RoPE entry must be objects.")
    for part, fixed in zip(parts, FIXED):
        for name, value in fixed.items():
            if part.get(name, value) not in (value, None):
                raise ValueError(f"config.json: {name} must be {json.dumps(value)}: nothing else is built here.")
    config = Config(_rope(_known(TextConfig(), parts[0]), rope or {}), _known(VisionConfig(image_size=448), parts[1]),
                    data.get("vision_taps", "input"), data.get("mask_prefix_attention", True))
    if data.get("image_token_index", config.text.vocab_size) != config.text.vocab_size:
        raise ValueError("config.json: image_token_index must be vocab_size, the first id behind lm_head.")
    _check_config(config)
    return config


# Entries of text_config and vision_config that would change the computation.
FIXED = ({"hidden_act": "silu", "tie_word_embeddings": False},
         {"hidden_act": "gelu", "num_channels": 3, "max_num_tiles": 4,
          "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]})
ROPE = {"factor": "rope_factor", "low_freq_factor": "rope_low", "high_freq_factor": "rope_high",
        "original_max_position_embeddings": "rope_original"}


def _known(default, data):
    """A config dataclass with those entries of `data` that it names."""
    return replace(default, **{name: _number(f"config.json: {name}", value, type(getattr(default, name)))
                               for name, value in data.items() if value is not None
                               and name in default.__dataclass_fields__ and name not in ROPE.values()})


def _number(name, value, wanted):
    """An entry of a JSON file as int, float or tuple of ints; NaN, strings, booleans and absurd sizes are refused."""
    if wanted is tuple and isinstance(value, (list, tuple)) and len(value) <= 200:
        return tuple(n if n == 0 and type(n) is int else _number(name, n, int) for n in value)
    if type(value) not in (int, float) or wanted is tuple:
        raise ValueError(f"{name} must be {'a list of at most 200 numbers' if wanted is tuple else 'a number'}.")
    if not 0 < value < 2**21 or wanted(value) != value:
        raise ValueError(f"{name} is {str(value)[:40]}, which is out of range.")
    return wanted(value)


def _rope(text, rope):
    """`text` with the entries of rope_parameters or rope_scaling. Absent means plain RoPE, as in transformers."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or (kind == "llama3" and ROPE.keys() - rope.keys()):
        raise ValueError(f"config.json: the RoPE entry must be \"default\", or \"llama3\" with {', '.join(ROPE)}.")
    names = (ROPE if kind == "llama3" else {}) | {"rope_theta": "rope_theta"}
    read = {ours: _number(f"config.json: {theirs}", rope[theirs], type(getattr(text, ours)))
            for theirs, ours in names.items() if theirs in rope}
    return replace(text, **{"rope_factor": 1.0} | read)


def _check_config(config):
    """Refuse sizes that cannot be meant before memory is taken for them."""
    text, vision = config.text, config.vision
    if text.hidden_size % (2 * text.num_attention_heads) or text.num_attention_heads % text.num_key_value_heads:
        raise ValueError("config.json: the heads of the decoder do not divide its hidden size.")
    if vision.hidden_size % vision.attention_heads or vision.image_size % vision.patch_size:
        raise ValueError("config.json: the heads or patches of the vision tower do not divide its sizes.")
    if config.vision_taps not in ("input", "output") or type(config.mask_prefix_attention) is not bool:
        raise ValueError('config.json: vision_taps must be "input" or "output", mask_prefix_attention true or false.')
    if max((text.num_hidden_layers, vision.num_hidden_layers, vision.num_global_layers)) > 200:
        raise ValueError("config.json: more than 200 layers, which is out of range.")
    for part, name in ((text, "cross_attention_layers"), (vision, "intermediate_layers_indices")):
        layers, indices = part.num_hidden_layers, getattr(part, name)
        if list(indices) != sorted(set(indices)) or max(indices, default=0) >= layers:
            raise ValueError(f"config.json: {name} must be rising numbers below {layers}, the number of layers.")
    if vision.tokens * vision.hidden_size > 2**36 or text.rope_high <= text.rope_low:
        raise ValueError("config.json: image_size, or high_freq_factor against low_freq_factor, is out of range.")


# ---------------------------------------------------------------- 2. Linear and LoRA


class Linear(nn.Linear):
    """A linear layer that can carry a low-rank adapter: W x + (alpha / rank) B (A x), B starting at zero (Hu et al.,
    arXiv 2106.09685). The adapter is float32 beside weights of any type; W itself is never written to."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("lora_A", None)
        self.register_module("lora_B", None)
        self.lora_scale, self.lora_on = 0.0, True

    def add_lora(self, rank, alpha):
        """Freeze W and add A (rank, in), B (out, rank)."""
        self.requires_grad_(False)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=self.weight.device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=self.weight.device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_scale = alpha / rank

    def forward(self, x):
        if self.lora_A is None or not self.lora_on:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        low = F.linear(rows, self.lora_A.weight.to(x.dtype))
        y = F.linear(rows, self.weight, self.bias).addmm_(low, self.lora_B.weight.to(x.dtype).T, alpha=self.lora_scale)
        return y.view(*x.shape[:-1], -1)

    def merged(self):
        """W + (alpha / rank) B A in W's type, summed in float32 so that it rounds once."""
        if self.lora_A is None:
            return self.weight
        delta = self.lora_scale * (self.lora_B.weight @ self.lora_A.weight)
        return (self.weight.float() + delta).to(self.weight.dtype)


PARTS = {"decoder": "language_model.model.", "projector": "multi_modal_projector", "tower": "vision_model."}


def add_lora(model, rank, alpha, where=PARTS["decoder"]):
    """Adapters on every Linear whose name starts with `where` (one or a tuple; default: all of the decoder, not lm_head);
    everything else is frozen. Add them after loading weights. Returns the number of adapted layers."""
    model.requires_grad_(False)
    chosen = [m for name, m in model.named_modules() if isinstance(m, Linear) and name.startswith(where)]
    if not chosen:
        raise ValueError(f"no linear layer's name starts with {where!r}, so there is nothing to adapt.")
    for module in chosen:
        module.add_lora(rank, alpha)
    return len(chosen)


@torch.no_grad()
def merge_lora(model):
    """Add every adapter into its weights and take it out: the same model, all of it trainable again."""
    for module in [m for m in model.modules() if isinstance(m, Linear) and m.lora_A is not None]:
        module.weight.copy_(module.merged())
        module.lora_A = module.lora_B = None
        model.requires_grad_(True)


@contextmanager
def adapters_off(model):
    """Within this context the model is the one that the adapters started from: the reference policy for free."""
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    for layer in layers:
        layer.lora_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_on = True


# ---------------------------------------------------------------- 3. Text decoder


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight (that order is the checkpoint's)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def rope_frequencies(c):
    """Inverse wavelengths (E/2,), float32. "llama3" divides those of low frequency by `rope_factor` and blends in
    between (Llama 3.1's context extension)."""
    inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    turns = c.rope_original * inverse / (2 * math.pi)  # full turns within the original context
    keep = ((turns - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
    return inverse * (keep + (1 - keep) / c.rope_factor)


def rope_table(c, positions):
    """cos and sin (B, 1, T, E) in float32 for positions (B, T); the first half of sin has the minus of `rotate`."""
    angles = (positions[..., None].float() * rope_frequencies(c).to(positions.device))[:, None]  # (B, 1, T, E/2)
    return angles.cos().repeat(1, 1, 1, 2), torch.cat([-angles.sin(), angles.sin()], -1)


def rotate(x, table):
    """RoPE on x (B, heads, T, E): the two halves of a head are the real and imaginary parts ("rotate_half")."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def split_heads(x, heads):
    """(B, T, heads * E) -> (B, heads, T, E)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def grouped_attention(q, k, v, mask):
    """Attention of q (B, H, T, E) over k, v (B, K, S, E), H a multiple of K, without repeating k and v: the query
    heads that share a key head become more queries of it. mask (B, 1, T or 1, S): True where seen, or what to add to the
    scores; None: all is seen. -> (B, T, H * E)"""
    B, H, T, E = q.shape
    share = H // k.shape[1]
    q = q.reshape(B, k.shape[1], share * T, E)
    if T == 1 and mask is not None and mask.is_floating_point():  # torch's kernel is slow on CPU for so few queries
        bias = mask.expand(-1, k.shape[1], -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=E**-0.5)
        return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, 1, H * E)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, share, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(B, H, T, E).transpose(1, 2).flatten(2)


def causal_attention(q, k, v, mask):
    """The same where mask None means causal among the T tokens, which needs none."""
    if mask is not None:
        return grouped_attention(q, k, v, mask)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The projections of grouped-query attention: H query heads over K key and value heads of size E."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, c.hidden_size, bias=False)


class SelfAttention(Attention):
    """Causal grouped-query attention with RoPE."""

    def forward(self, x, rope, mask=None, store=None):
        """x (B, T, D). mask None: causal among the T tokens. `store` puts k, v into the cache and returns all of it."""
        q = rotate(split_heads(self.q_proj(x), self.heads), rope)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), rope)
        v = split_heads(self.v_proj(x), self.kv_heads)
        return self.o_proj(causal_attention(q, *(store(k, v) if store else (k, v)), mask))


class CrossAttention(Attention):
    """Text queries over image keys: no RoPE, not causal, an RMSNorm on every query and key head."""

    def __init__(self, c):
        super().__init__(c)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, c.rms_norm_eps), RMSNorm(self.head_dim, c.rms_norm_eps)

    def keys_values(self, features):
        """features (B, N, D) -> k (normed), v (B, K, N, E): computed once per image, kept for every later token."""
        return (self.k_norm(split_heads(self.k_proj(features), self.kv_heads)),
                split_heads(self.v_proj(features), self.kv_heads))

    def forward(self, x, keys_values, image, mask):
        """x (B, T, D) -> (B, T, D): rows that share a set of images are queries of the same keys. mask: of `visible`."""
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        return self.o_proj(image.unfold(grouped_attention(image.fold(q), *keys_values, mask)))


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SelfLayer(nn.Module):
    """h + attention(norm h), then h + MLP(norm h)."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, h, rope, mask=None, store=None):
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, store)
        return h + self.mlp(self.post_attention_layernorm(h))


class CrossLayer(nn.Module):
    """The same with cross attention, each branch behind tanh of a learned gate; zero for tokens that see no image."""

    def __init__(self, c, mask_prefix_attention):
        super().__init__()
        self.cross_attn, self.mlp = CrossAttention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))
        self.mask_prefix_attention = mask_prefix_attention

    def forward(self, h, image, mask, sees, keys_values=None):
        """h (B, T, D); mask and sees of ImageContext.visible; keys_values: kept ones, or None to compute them here."""
        if keys_values is None:
            keys_values = self.cross_attn.keys_values(image.features)
        attention, mlp = self.cross_attn_attn_gate.tanh(), self.cross_attn_mlp_gate.tanh() * sees
        attention = attention * sees if self.mask_prefix_attention else attention
        h = h + attention * self.cross_attn(self.input_layernorm(h), keys_values, image, mask)
        return h + mlp * self.mlp(self.post_attention_layernorm(h))


class TextModel(nn.Module):
    """Embedding, layers, final norm. Text-only calls skip the cross layers, which is the same as seeing no image."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config.text
        self.embed_tokens = nn.Embedding(c.vocab_size + 8, c.hidden_size)
        self.layers = nn.ModuleList(
            CrossLayer(c, config.mask_prefix_attention) if i in c.cross_attention_layers else SelfLayer(c)
            for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.recompute = False

    def forward(self, ids, positions, mask, image=None, cache=None):
        """ids, positions (B, T); mask (B, 1, T, S) or None; image: ImageContext or None (a cache has its own)."""
        h = self.embed_tokens(ids)
        rope = [t.to(h.dtype) for t in (rope_table(self.config, positions) if cache is None else cache.rope())]
        image = image if cache is None else cache.image
        if image is not None:
            shown = ids == self.config.vocab_size  # <|image|> has the first row behind the vocabulary
            sight = image.visible(shown) if cache is None else image.visible(cache.note_image_tokens(shown), cache.at)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SelfLayer):
                store = None if cache is None else cache.writer(i)
                h = _run(self, layer, h, rope, mask, store)
            elif image is not None:
                kept = None if cache is None else cache.keys_values(i, layer.cross_attn)
                h = _run(self, layer, h, image, *sight, kept)
        return self.norm(h)


def _run(owner, layer, *args):
    """Call a layer, keeping only its input for the backward pass when `owner.recompute` asks for it."""
    if owner.recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


class ImageContext:
    """What rows of text may look at: R sets of up to I images, and the set of each row. Rows that share a set (the
    episodes of a group) share its keys and values: they are folded into the query axis.

    features (R, I * M * P, D): projected image tokens; tiles (R, I, M) bool: those that exist; rows (B,) long: the set
    of each row of text, by default its own. prefix_looks: tokens before an image look at everything (transformers).
    """

    def __init__(self, features, tiles, rows=None, prefix_looks=False):
        self.features, self.tiles, self.prefix_looks = features, tiles, prefix_looks
        self.rows = torch.arange(len(tiles), device=tiles.device) if rows is None else rows
        same = self.rows[:, None] == self.rows
        self.share = int(same.sum(1).max())  # rows of the set that has most
        self.place = self.rows * self.share + same.tril(-1).sum(1)  # (B,) of the R * share slots, each row's
        self.whole = bool(tiles.all())

    def regroup(self, rows):
        """The same sets for other rows of text: rows (B,) is the set of each."""
        return ImageContext(self.features, self.tiles, rows, self.prefix_looks)

    def select(self, rows):
        """The context of the given rows of text (a LongTensor), without the sets that none of them uses."""
        sets, rows = self.rows[rows].unique(return_inverse=True)
        if len(sets) == len(self.tiles):
            return self.regroup(rows)
        return ImageContext(self.features[sets], self.tiles[sets], rows, self.prefix_looks)

    def fold(self, x):
        """(B, heads, T, E) of rows -> (R, heads, share * T, E) of sets. Slots without a row hold ones."""
        slots = x.new_ones(len(self.tiles) * self.share, *x.shape[1:]).index_copy(0, self.place, x)
        return slots.unflatten(0, (-1, self.share)).transpose(1, 2).flatten(2, 3)

    def unfold(self, x):
        """(R, share * T, D) of sets -> (B, T, D) of rows."""
        return x.unflatten(1, (self.share, -1)).flatten(0, 1)[self.place]

    def visible(self, shown, at=None):
        """shown (B, S) bool: where <|image|> stands; at (B, T): the positions asked for, by default all S.

        A token sees the latest image up to itself, and those directly before that one in the same run of <|image|>
        tokens. Returns (mask (R, 1, share * T or 1, N) bool, True where seen, or None; sees (B, T, 1) bool). A token
        that sees nothing has a mask of ones (of -inf it would be NaN, in the gradient too), and `sees` discards it.
        """
        end = shown.cumsum(1)  # tokens see the images first .. end - 1 of their row
        begins = shown & ~F.pad(shown, (1, 0))[:, :-1]
        first = (begins * end).cummax(1).values - 1
        if at is not None:
            first, end = first.gather(1, at), end.gather(1, at)
        tiles, tokens = self.tiles[self.rows], self.features.shape[1] // self.tiles[0].numel()  # (B, I, M), P
        number = tiles.any(-1).cumsum(1)  # (B, I): missing images are not counted
        if end.shape[1] > 1 and bool((end[:, -1] > number[:, -1]).any()):
            raise ValueError("a row of text has more <|image|> tokens than it was given images.")
        number = (number - 1)[:, None]
        seen = (number >= first[..., None]) & (number < end[..., None])
        seen = (seen[..., None] & tiles[:, None]).flatten(2)  # (B, T, I * M)
        sees = seen.any(-1, keepdim=True)
        if self.tiles.shape[1] == 1 and not self.prefix_looks:  # one image a row: its tiles are mask enough
            mask = (self.tiles | ~self.tiles.any(-1, keepdim=True))[:, None]  # (R, 1, 1, M)
            return (None if self.whole else mask.repeat_interleave(tokens, -1)), sees
        mask = (seen | ~sees).repeat_interleave(tokens, -1)  # (B, T, N)
        return self.fold(mask[:, None]), sees


class Prompts:
    """Prompts that rows of a training pass begin with, each computed once for all of them: a cache with gradients.

    A pass over the U prompts, ids (U, T), fills it; after `follow`, a pass over the B rows reads it. Prompts are padded
    on the right: the mask of the second pass has to hide that.
    """

    def __init__(self, config, ids, image):
        self.config, self.image, self.kept, self.cross, self.rows = config, image, {}, {}, None
        self.shown, self.at = ids == config.vocab_size, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def follow(self, rows, ids, at, image):
        """Row b goes on from prompt rows[b] with the tokens at[b] of ids[b], which begins with that prompt."""
        self.rows, self.shown, self.at, self.image = rows, ids == self.config.vocab_size, at, image

    def writer(self, i):
        """A function of k, v (B, K, T, E) of layer i that returns those of the prompts before them."""
        rows, before = self.rows, self.kept.get(i)

        def store(k, v):
            if before is None:
                self.kept.setdefault(i, (k, v))  # not the second time, when layers are recomputed
                return k, v
            return [torch.cat([old.index_select(0, rows), new], 2) for old, new in zip(before, (k, v))]

        return store

    def rope(self):
        """`rope_table` of the tokens of this pass."""
        return rope_table(self.config, self.at)

    def note_image_tokens(self, _):
        """Where <|image|> stands in the rows, their prompts included."""
        return self.shown

    def keys_values(self, i, attention):
        """k, v (R, K, N, E) of the images for cross layer i, for both passes."""
        if i not in self.cross:
            self.cross[i] = attention.keys_values(self.image.features)
        return self.cross[i]


# ---------------------------------------------------------------- 4. Vision tower


class VisionAttention(nn.Module):
    """Plain multi-head attention, no bias."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(c.hidden_size, c.hidden_size, bias=False) for _ in range(4))

    def forward(self, x, mask):
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc1, exact GELU, fc2, with biases."""

    def __init__(self, c):
        super().__init__()
        self.fc1 = Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer; the global ones have a tanh gate on each branch."""

    def __init__(self, c, gated):
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(c), VisionMLP(c)
        self.input_layernorm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        if gated:
            self.gate_attn, self.gate_ffn = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.gated = gated

    def forward(self, x, mask):
        a = self.self_attn(self.input_layernorm(x), mask)
        x = x + (self.gate_attn.tanh() * a if self.gated else a)
        m = self.mlp(self.post_attention_layernorm(x))
        return x + (self.gate_ffn.tanh() * m if self.gated else m)


class VisionLayers(nn.Module):
    """A stack of vision layers (a module of its own because the hub's names have it)."""

    def __init__(self, c, count, gated):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(c, gated) for _ in range(count))


class TileEmbedding(nn.Module):
    """x (I, M, P, C) + tanh(gate) * what the aspect ratio says of each tile's place."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(9, c.max_num_tiles * c.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, ratio_ids):
        table = self.embedding(ratio_ids).view(x.shape[0], x.shape[1], 1, x.shape[3])
        return x + self.gate.tanh() * table


class PositionEmbedding(nn.Module):
    """x (I, M, P, C) + (1 - tanh g) * (place in the tile) + tanh g * (place in the tile, tile and aspect ratio)."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(c.tokens, c.hidden_size))
        self.tile_embedding = nn.Embedding(9, c.max_num_tiles * c.tokens * c.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, ratio_ids):
        g = self.gate.tanh()
        return x + (1 - g) * self.embedding + g * self.tile_embedding(ratio_ids).view(x.shape)


class VisionTower(nn.Module):
    """Tiles of images to the final state of every patch with the tapped states of earlier layers beside it."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config.vision
        self.taps = [i - (config.vision_taps == "input") for i in c.intermediate_layers_indices]  # layers' outputs
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.gated_positional_embedding = PositionEmbedding(c)
        self.pre_tile_positional_embedding = TileEmbedding(c)
        self.post_tile_positional_embedding = TileEmbedding(c)
        self.layernorm_pre = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.layernorm_post = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.transformer = VisionLayers(c, c.num_hidden_layers, gated=False)
        self.global_transformer = VisionLayers(c, c.num_global_layers, gated=True)
        self.recompute = False

    def embed(self, tiles, ratio_ids):
        """tiles (I, M, 3, L, L) -> tokens (I, M, P, C) before the first layer."""
        I, M = tiles.shape[:2]
        x = self.patch_embedding(tiles.flatten(0, 1).to(self.class_embedding.dtype)).flatten(2)  # (I * M, C, P - 1)
        x = self.pre_tile_positional_embedding(x.transpose(1, 2).unflatten(0, (I, M)), ratio_ids)
        x = torch.cat([self.class_embedding.expand(I, M, 1, -1), x], 2)
        return self.layernorm_pre(self.gated_positional_embedding(x, ratio_ids))

    def forward(self, tiles, ratio_ids, tile_mask):
        """tiles (I, M, 3, L, L); ratio_ids (I,) 0 = no image, 1..8; tile_mask (I, M) 1 = real -> (I, M, P, C * 6).

        Tokens are padded to a multiple of 8 per tile, and only pad-to-pad attention is forbidden: real tokens do attend
        to pads and to empty tiles. That is what the checkpoint was trained with; "fixing" it changes the features.
        """
        I, M, P = tiles.shape[0], tiles.shape[1], self.config.tokens
        x = F.pad(self.embed(tiles, ratio_ids), (0, 0, 0, -P % 8))
        slots = x.shape[2]
        real = (tile_mask.bool()[:, :, None] & (torch.arange(slots, device=x.device) < P)).flatten(1)  # (I, M * slots)
        mask = (real[:, :, None] | real[:, None, :])[:, None]  # (I, 1, M * slots, M * slots)
        x = x.flatten(1, 2)
        kept = {-1: x}  # layer -> its output, of the tapped layers only
        for i, layer in enumerate(self.transformer.layers):
            x = _run(self, layer, x, mask)
            if i in self.taps:
                kept[i] = x
        x = self.layernorm_post(x).unflatten(1, (M, slots))
        x = self.post_tile_positional_embedding(x, ratio_ids).flatten(1, 2)
        for layer in self.global_transformer.layers:
            x = _run(self, layer, x, mask)
        # The tap index runs fastest: feature c * taps + j, not blocks of C.
        out = torch.cat([x, torch.stack([kept[i] for i in self.taps], -1).flatten(2)], -1)
        return out.unflatten(1, (M, slots))[:, :, :P]


# ---------------------------------------------------------------- 5. Images

RATIOS = [(rows, cols) for rows in range(1, 5) for cols in range(1, 5) if rows * cols <= 4]  # id = index + 1; height first
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def open_image(source):
    """A picture as a person sees it, in 8-bit RGB: upright (EXIF), alpha over white, 16-bit grey scaled down.

    source: a path, bytes or a PIL image. Raises ValueError with one sentence when it cannot be read, or when its header
    announces more than MAX_PIXELS pixels: then none of them is decoded.
    """
    name = str(source)[:200] if isinstance(source, (str, Path)) else "the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # PIL's limit is higher than ours
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        large = image.width * image.height > MAX_PIXELS
        rgb = None if large else _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        large = True
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise ValueError(f"{name} cannot be read as a picture ({str(error)[:120]}).") from None
    if large:
        raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels: scale it down first.")
    return rgb


def _to_rgb(image):
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray((grey + 0.5).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def cut_tiles(image, tile):
    """An 8-bit RGB PIL image -> tiles (n, 3, tile, tile) float32, row by row, and the id 1..8 of their arrangement.

    The picture goes to the top left of the canvas of `RATIOS` that scales it up least, or else down least (the smaller
    one when several do), shrunk but never enlarged beyond one tile; black fills the rest before normalising. Equal
    to transformers' MllamaImageProcessorPil with the checkpoint's settings, to the last bit.
    """
    width, height = image.size
    scales = [min(rows * tile / height, cols * tile / width) for rows, cols in RATIOS]
    best = min((s for s in scales if s >= 1), default=max(scales))
    rows, cols = min((ratio for ratio, s in zip(RATIOS, scales) if s == best), key=math.prod)
    w, h = min(max(width, tile), cols * tile), min(max(height, tile), rows * tile)
    if w / width < h / height:
        h = min(max(int(height * (w / width)), 1), h)  # at least one pixel: 4000 x 10 has to survive
    else:
        w = min(max(int(width * (h / height)), 1), w)
    canvas = np.zeros((rows * tile, cols * tile, 3), np.uint8)
    canvas[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    levels = (levels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)  # (256, 3): every value a pixel can have
    tiles = levels[canvas, np.arange(3)].reshape(rows, tile, cols, tile, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles.reshape(rows * cols, 3, tile, tile)), RATIOS.index((rows, cols)) + 1


def pack_images(sets, tile):
    """Sets of pictures (lists of what `open_image` returns) -> tiles (R, I, 4, 3, tile, tile) float32 and ratio_ids
    (R, I) long, both 0 where there is none. I is the size of the largest set, at least 1."""
    count = max([1, *map(len, sets)])
    tiles = torch.zeros(len(sets), count, 4, 3, tile, tile)
    ratio_ids = torch.zeros(len(sets), count, dtype=torch.long)
    for r, pictures in enumerate(sets):
        for i, picture in enumerate(pictures):
            cut, ratio_ids[r, i] = cut_tiles(picture, tile)
            tiles[r, i, : len(cut)] = torch.from_numpy(cut)
    return tiles, ratio_ids


# ---------------------------------------------------------------- 6. The whole model


def common_prompts(ids, start, image):
    """Which rows of ids (B, T) have the same tokens before start (B,), and the same images (an ImageContext or None).
    Returns rows (B,): the number of each row's prompt, and first (U,): a row that has it."""
    key = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) >= start[:, None], -1)
    key = key if image is None else torch.cat([key, image.rows[:, None]], 1)
    prompts, rows = key.unique(dim=0, return_inverse=True)
    return rows, (rows == torch.arange(len(prompts), device=ids.device)[:, None]).int().argmax(1)


class CausalLM(nn.Module):
    """The decoder and its output layer (a module of its own because the hub's names have it)."""

    def __init__(self, config):
        super().__init__()
        self.model = TextModel(config)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)


class LlamaVision(nn.Module):
    """Llama-3.2-Vision: vision tower, projector, decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.multi_modal_projector = Linear(config.vision.output_dim, config.text.hidden_size)
        self.language_model = CausalLM(config)

    @property
    def device(self):
        """Where the weights are."""
        return self.language_model.lm_head.weight.device

    @property
    def trains_vision(self):
        """Whether anything is trained before the decoder: then pictures are encoded with gradient, in every pass."""
        return any(p.requires_grad for part in (self.vision_model, self.multi_modal_projector) for p in part.parameters())

    def recompute(self, on=True):
        """Gradient checkpointing of every layer, of the tower too: less memory, one more forward pass."""
        self.vision_model.recompute = self.language_model.model.recompute = on

    def image_features(self, tiles, ratio_ids, tile_mask):
        """tiles (I, M, 3, L, L), ratio_ids (I,), tile_mask (I, M) -> projected image tokens (I, M * P, D)."""
        return self.multi_modal_projector(self.vision_model(tiles, ratio_ids, tile_mask)).flatten(1, 2)

    def encode_images(self, tiles, ratio_ids, rows=None):
        """Encode sets of images as `pack_images` packs them: tiles (R, I, M, 3, L, L), ratio_ids (R, I), 0 = no image.

        rows (B,): the set of each row of text, by default its own. Returns an ImageContext, None without any image.
        Call it under no_grad while tower and projector are frozen, once for all that is done with the images.
        """
        if not ratio_ids.any():
            return None
        tiles, ratio_ids = tiles.to(self.device), ratio_ids.to(self.device)
        exists, slot = ratio_ids > 0, torch.arange(tiles.shape[2], device=self.device)
        count = ratio_ids.new_tensor([0] + [math.prod(ratio) for ratio in RATIOS])[ratio_ids][..., None]  # (R, I, 1)
        # With transformers' semantics tokens before an image attend to missing images too: these are encoded as well.
        wanted = exists if self.config.mask_prefix_attention else torch.ones_like(exists)
        encoded = self.image_features(tiles[wanted], ratio_ids[wanted], (slot < count.clamp(min=1))[wanted])
        features = encoded.new_zeros(*exists.shape, *encoded.shape[1:])
        features[wanted] = encoded
        return ImageContext(features.flatten(1, 2), slot < count, rows, not self.config.mask_prefix_attention)

    def forward(self, ids, real=None, image=None):
        """Hidden states (B, T, D) of ids (B, T) after the final norm.

        real (B, T) bool marks tokens that are not padding. Padding on the right needs none: no token looks ahead.
        image: what `encode_images` made of the rows' images. ValueError when a row has more <|image|> tokens than images.
        """
        if real is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            return self.language_model.model(ids, positions, None, image)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        mask = real[:, None, :].expand(-1, ids.shape[1], -1).tril()
        mask = mask | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)  # pads see themselves: no NaN
        return self.language_model.model(ids, positions, mask[:, None], image)

    def logits(self, hidden):
        """(..., D) -> (..., V) float32."""
        return self.language_model.lm_head(hidden).float()

    def extend(self, cache, ids, lengths):
        """Feed ids (B, T), of which the first `lengths` (B,) of each row are real, after what `cache` holds.

        Returns logits (B, V) float32 behind the last real token of each row. A pad writes to a slot beyond the row's
        end, which no query sees before a later token has overwritten it.
        """
        first = cache.used == 0
        slots = cache.next_slots(ids.shape[1])  # (B, T)
        # (B, 1, T, used); the first tokens of all rows are causal among themselves, which needs no mask
        mask = None if first else (torch.arange(cache.used, device=ids.device) <= slots[..., None])[:, None]
        if mask is not None and ids.shape[1] == 1 and ids.device.type == "cpu":
            mask = torch.zeros((), dtype=cache.dtype).where(mask, torch.finfo(cache.dtype).min)  # once for all layers
        hidden = self.language_model.model(ids, slots, mask, cache=cache)
        cache.length = cache.length + lengths
        last = hidden[torch.arange(len(ids), device=ids.device), (lengths - 1).clamp(min=0)] if ids.shape[1] > 1 else hidden[:, 0]
        return self.logits(last)

    def log_probs(self, ids, chosen, temperature=1.0, image=None):
        """Log-probabilities of the tokens ids[b, t] with chosen[b, t] = True, each given all tokens before it.

        ids (B, T) padded on the right, chosen (B, T) bool, never True at t = 0. Returns (number chosen,) float32 in
        row-major order, of softmax(logits / temperature): the distribution that was sampled from, so that the ratio to
        `old_log_probs` is 1 before an update. Only chosen positions reach lm_head.
        A prompt (what comes before the first chosen token) that several rows have is computed once, with its gradient.
        """
        start = (chosen.int().argmax(1) - 1).clamp(min=0)  # (B,): a prompt's last token predicts the first chosen one
        rows, first = common_prompts(ids, start, image)
        if start.sum() - start[first].sum() <= ids.numel() // 16:  # too little is saved
            hidden, ids, chosen = self(ids[:, :-1], image=image), ids[:, 1:], chosen[:, 1:]
        else:
            hidden, ids, chosen = self._after_prompts(ids, chosen, image, start, rows, first)
        logits = self.logits(hidden[chosen])
        log_p = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        return log_p.gather(1, ids[chosen][:, None])[:, 0]

    def _after_prompts(self, ids, chosen, image, start, rows, first):
        """Hidden states (B, T', D) from the last token of each row's prompt on, and of the token behind each: its id and
        whether it is chosen, both (B, T'). start (B,): where that last token is; rows and first: of `common_prompts`."""
        width, end = int(start.max()), ids.shape[1] - 1
        count = int(((chosen * torch.arange(end + 1, device=ids.device)).amax(1) - start).max())  # up to the last chosen
        prompts = Prompts(self.config.text, ids[first, :width], image and image.regroup(image.rows[first]))
        self.language_model.model(ids[first, :width], None, None, cache=prompts)
        at = start[:, None] + torch.arange(count, device=ids.device)
        inside, at = at < end, at.clamp(max=end - 1)
        prompts.follow(rows, ids, at, image)
        begin = start[:1] if (start == width).all() else start  # one mask for all rows where it is the same
        mask = torch.cat([(torch.arange(width, device=ids.device) < begin[:, None])[:, None].expand(-1, count, -1),
                          torch.ones(len(begin), count, count, dtype=torch.bool, device=ids.device).tril()], 2)
        hidden = self.language_model.model(ids.gather(1, at), None, mask[:, None], cache=prompts)
        return hidden, ids.gather(1, at + 1), chosen.gather(1, at + 1) & inside


def init_weights(model, seed):
    """Random weights for training from scratch: normal, 0.02 for embeddings, 0.6 / sqrt(inputs) for matrices (smaller
    where they write to the residual stream).

    Gates start at 0.5: at the zero of a fresh Llama-3.2-Vision a model that is trained from nothing ignores images.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = model.config.text.num_hidden_layers
    for name, p in model.named_parameters():
        if "gate" in name.rsplit(".", 1)[-1]:
            nn.init.constant_(p, 0.5)
        elif p.dim() == 1:
            nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight"))
            table = "embed" in name or "lm_head" in name
            std = 0.02 if table else 0.6 / math.sqrt(p[0].numel()) / (math.sqrt(depth) if writes else 1)
            nn.init.normal_(p, std=std, generator=generator)
    return model


# ---------------------------------------------------------------- 7. Cache and generation


class Cache:
    """Keys and values of every self-attention layer in slots taken once: rows need not be equally long.

    Token t of a row lies in slot t, whatever the other rows hold. `length` (B,) counts the tokens of each row.
    `image` is the ImageContext of the rows: the keys and values of its sets are computed at first use and kept.
    """

    def __init__(self, model, rows, slots, image=None):
        c, weight = model.config.text, model.language_model.lm_head.weight
        self.layers, self.dtype = [i for i in range(c.num_hidden_layers) if i not in c.cross_attention_layers], weight.dtype
        self.config, shape = c, (rows, c.num_key_value_heads, slots, c.head_dim)
        self.k = {i: torch.zeros(shape, dtype=weight.dtype, device=weight.device) for i in self.layers}
        self.v = {i: torch.zeros(shape, dtype=weight.dtype, device=weight.device) for i in self.layers}
        self.length = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.shown = torch.zeros(rows, slots, dtype=torch.bool, device=weight.device)  # where <|image|> stands
        self.slots, self.used, self.image, self.cross = slots, 0, image, {}
        self.table = ()

    def reserve(self, count):
        """Make sure that `count` more tokens fit into every row. Call it between turns: it asks the device."""
        self.used = int(self.length.max())
        extra = self.used + count - self.slots
        if extra > 0:
            for kept in (self.k, self.v):
                kept.update({i: F.pad(t, (0, 0, 0, extra)) for i, t in kept.items()})
            self.shown = F.pad(self.shown, (0, extra))
            self.slots += extra
        return self

    def next_slots(self, count):
        """Slots (B, count) for the next `count` tokens of each row. Raises ValueError when they were not reserved."""
        self.used += count  # an upper bound of the longest row, without asking the device
        if self.used > self.slots:
            raise ValueError(f"{self.used} tokens do not fit into the {self.slots} slots of the cache: reserve more.")
        device, heads = self.length.device, self.config.num_key_value_heads
        self.at = self.length[:, None] + torch.arange(count, device=device)
        first = torch.arange(len(self.at) * heads, device=device).view(-1, heads, 1) * self.slots
        self.place = (first + self.at[:, None]).flatten()  # where these tokens are in k or v, all rows and heads in one line
        return self.at

    def writer(self, i):
        """A function that stores k, v (B, K, T, E) of layer i in the opened slots and returns all slots in use."""
        def store(k, v):
            for kept, new in ((self.k[i], k), (self.v[i], v)):
                kept.view(-1, kept.shape[-1]).index_copy_(0, self.place, new.reshape(-1, kept.shape[-1]))
            return self.k[i][:, :, : self.used], self.v[i][:, :, : self.used]

        return store

    def rope(self):
        """`rope_table` of the opened slots, looked up in one of all slots."""
        if not self.table or self.table[0].shape[2] < self.slots:
            self.table = rope_table(self.config, torch.arange(self.slots, device=self.at.device)[None])
        return [t[0, 0, self.at][:, None] for t in self.table]

    def note_image_tokens(self, shown):
        """Note where <|image|> stands in the opened slots (B, T) -> where it stands in all slots in use."""
        self.shown.scatter_(1, self.at, shown)
        return self.shown[:, : self.used]

    def keys_values(self, i, attention):
        """k, v (R, K, N, E) of the images for cross layer i: once for all rows that share a set, and all their turns."""
        kept = self.cross.get(i)
        done = kept[0].shape[2] if kept else 0
        if done < self.image.features.shape[1]:
            new = attention.keys_values(self.image.features[:, done:])
            self.cross[i] = tuple(torch.cat(pair, 2) for pair in zip(kept, new)) if kept else new
        return self.cross[i]

    def add_images(self, more):
        """Further images for the turn that is fed next: `more` is an ImageContext of the cache's rows (with empty sets
        for rows that get none) or None. Nothing is encoded again; rows share what both their old and new sets share."""
        if more is not None and self.image is not None:
            (old, new), rows = torch.stack([self.image.rows, more.rows]).unique(dim=1, return_inverse=True)
            self.cross = {i: (k[old], v[old]) for i, (k, v) in self.cross.items()}
            more = ImageContext(torch.cat([self.image.features[old], more.features[new]], 1),
                                torch.cat([self.image.tiles[old], more.tiles[new]], 1), rows, more.prefix_looks)
        self.image = more or self.image

    def keep_latest_image(self):
        """Drop all images but the latest of each row, with their keys and values: no token to come looks at the others.
        Not for rows whose latest <|image|> follows directly on another one, which tokens see together."""
        exists = self.image.tiles.any(-1)  # (R, I)
        number = torch.arange(exists.shape[1], device=exists.device)
        sets, latest = torch.arange(len(exists), device=exists.device), (exists * number).argmax(1)

        def keep(x, dim):
            return x.unflatten(dim, (len(number), -1)).movedim(dim, 1)[sets, latest]
        self.cross = {i: (keep(k, 2), keep(v, 2)) for i, (k, v) in self.cross.items()}
        self.image = ImageContext(keep(self.image.features, 1), keep(self.image.tiles, 1), self.image.rows,
                                  self.image.prefix_looks)
        self.shown = self.shown & (self.shown.cumsum(1) == self.shown.sum(1, keepdim=True))

    def select(self, rows):
        """Keep, drop or repeat rows (a LongTensor): one prompt becomes a group of episodes, solved ones leave."""
        for i in self.layers:
            self.k[i], self.v[i] = self.k[i][rows], self.v[i][rows]
        self.length, self.shown = self.length[rows], self.shown[rows]
        if self.image is not None:
            before, sets = len(self.image.tiles), self.image.rows[rows].unique()
            self.image = self.image.select(rows)
            if len(sets) < before:
                self.cross = {i: (k[sets], v[sets]) for i, (k, v) in self.cross.items()}
        return self


def sample(logits, temperature, generator=None):
    """One token for each row of logits (B, V), and its log-probability, both (B,). temperature 0: the likeliest, with
    its log-probability at temperature 1."""
    log_p = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    if temperature == 0:
        token = log_p.argmax(-1)
    else:  # one uniform number a row, looked up in the cumulated probabilities, needs no answer from the device
        total = log_p.exp().cumsum(-1, dtype=torch.float64)
        point = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator) * total[:, -1:]
        token = torch.searchsorted(total, point, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return token, log_p.gather(1, token[:, None])[:, 0]


@dataclass
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int = 64
    temperature: float = 1.0  # 0 = greedy
    generator: torch.Generator | None = None
    batch: int = 256  # episodes computed side by side: memory, not the result


@torch.inference_mode()
def generate(model, cache, logits, sampling, stop_ids):
    """Sample a response for every row of `cache`, whose next-token logits (B, V) are given.

    A row ends with a token of stop_ids, which belongs to its response, or after sampling.max_new_tokens. Returns
    (responses, log_probs): for each row a list of token ids and a list of floats. The cache then holds all tokens of a
    response but its last: continue with `extend`.
    """
    rows = logits.shape[0]
    stops = torch.tensor(sorted(stop_ids), device=logits.device)
    running = torch.ones(rows, dtype=torch.bool, device=logits.device)
    tokens, log_probs, alive = [], [], []
    for step in range(sampling.max_new_tokens):
        token, log_p = sample(logits, sampling.temperature, sampling.generator)
        tokens.append(token), log_probs.append(log_p), alive.append(running)
        running = running & (token[:, None] != stops).all(1)
        # Asking the device whether all rows are done costs a wait; every fourth token is often enough.
        if step + 1 == sampling.max_new_tokens or (step % 4 == 3 and not running.any()):
            break
        # Finished rows are computed along but do not grow: their slot is written again by whatever comes next.
        logits = model.extend(cache, token[:, None], running.long())
    counts = torch.stack(alive).sum(0).tolist()
    tokens, log_probs = torch.stack(tokens, 1).tolist(), torch.stack(log_probs, 1).tolist()
    return [t[:n] for t, n in zip(tokens, counts)], [p[:n] for p, n in zip(log_probs, counts)]


def pad_rows(rows, pad, device, side="right"):
    """Lists of token ids -> ids (B, T) and lengths (B,)."""
    width = max(len(r) for r in rows)
    fill = [[pad] * (width - len(r)) for r in rows]
    ids = [list(r) + f if side == "right" else f + list(r) for r, f in zip(rows, fill)]
    return torch.tensor(ids, device=device), torch.tensor([len(r) for r in rows], device=device)


# ---------------------------------------------------------------- 8. Tokenizer and chat

BOS, EOT, PAD, IMAGE = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"
STOPS = ("<|end_of_text|>", "<|eom_id|>", EOT)
TINY_SPECIAL = (BOS, EOT, PAD, "<|user|>", "<|assistant|>", IMAGE)  # <|image|> last: its id lies outside lm_head
DATE = "26 Jul 2024"  # pinned, or prompts would change every day


class Tokenizer:
    """A `tokenizers` file and the chat format of its model.

    Special tokens are found by name and only ever added as ids: text that spells one is encoded as plain text.
    The tiny tokenizer has one-token headers <|user|> and <|assistant|> and no system block; others speak Llama 3.2.
    """

    def __init__(self, bpe):
        self.bpe = bpe
        self.bpe.encode_special_tokens = True  # reads as: treat special tokens in text like any other text
        self.pad, self.eot, self.bos = (self._id(name) for name in (PAD, EOT, BOS))
        self.stop_ids = {bpe.token_to_id(name) for name in STOPS} - {None}
        self.short = bpe.token_to_id("<|user|>") is not None

    def _id(self, name):
        found = self.bpe.token_to_id(name)
        if found is None:
            raise ValueError(f"the tokenizer has no {name} token, so it is not one of Llama-3.2-Vision.")
        return found

    def encode(self, text):
        """Token ids of plain text."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Text of token ids; special tokens are spelled out, a stop token at the end is left off."""
        ids = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self.bpe.decode(ids, skip_special_tokens=False)

    def header(self, role, text=""):
        """Ids that open a message of `role`, with its text: the line break before a text may merge with its start."""
        if self.short:
            return [self._id(f"<|{role}|>"), *self.encode(text)]
        start, end = self._id("<|start_header_id|>"), self._id("<|end_header_id|>")
        return [start, *self.encode(role), end, *self.encode("\n\n" + text)]

    def prompt(self, text, image=False, system=""):
        """Ids of a conversation that opens with the user's text and waits for the first response.

        image: whether (or how many) pictures precede the text. Raises ValueError for a system message beside an image,
        which the published template refuses too, or for a tokenizer without system messages.
        """
        if system and (image or self.short):
            raise ValueError("a system message cannot stand beside an image or in the tiny format: put it into the text.")
        ids = [self.bos]
        if not self.short and not image:  # the published template adds this block to text-only conversations
            dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
            ids += self.header("system", dates + system.strip()) + [self.eot]
        return ids + self.turn(text, image)

    def turn(self, text, image=False):
        """Ids of one more user message and the header of the response to it; image as in `prompt`."""
        shown = [self._id(IMAGE)] * int(image)
        opened = self.header("user") + shown + self.encode(text) if shown else self.header("user", text)
        return opened + [self.eot] + self.header("assistant")


def train_tokenizer(texts, vocab_size=480):
    """The tiny tokenizer, learned from texts: cards, numbers, operators and directions stay tokens of their own, everything
    between them may merge across spaces. vocab_size counts the special tokens but <|image|>. Returns a Tokenizer."""
    bpe = BPE(models.BPE())
    pieces = Regex(r"\d+|(?<![A-Za-z])[AJQK](?![A-Za-z])|[-+*/()]|(?:slightly )?(?:left|right)|(?:north|south)(?:east|west)?|east|west")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(TINY_SPECIAL) + 1, show_progress=False, min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    spare = vocab_size - bpe.get_vocab_size() - len(TINY_SPECIAL) + 1  # few texts give few merges: the ids between are reserved
    names = [*TINY_SPECIAL[:-1], *(f"<|reserved_{i}|>" for i in range(spare)), TINY_SPECIAL[-1]]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(bpe)


# ---------------------------------------------------------------- 9. Loading and saving

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# How names begin in memory since transformers 4.52 (PEFT writes these), and on the hub (transformers writes those).
LAYOUTS = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
           ("model.vision_model.", "vision_model."), ("model.multi_modal_projector.", "multi_modal_projector."))
NOT_BUILT = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
             "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices")  # of PEFT's LoRA


def hub_name(name):
    """The hub's name of a tensor or module in either layout, of an adapter's too."""
    name = name.removeprefix("base_model.model.")
    return next((hub + name[len(new):] for new, hub in LAYOUTS if name.startswith(new)), name)


def write_atomically(path, write):
    """Call write(temporary path) beside `path`, then rename: a reader never meets half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path, data):
    """Write data as indented JSON, atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(data, indent=1) + "\n"))


@torch.no_grad()
def save_model(model, tokenizer, directory, dtype=None, shard_bytes=5 * 10**9):
    """Write a model directory in the hub's layout: config.json, tokenizer.json and the weights in `dtype` (default: as
    they are) with adapters merged, in one file, or if that were over shard_bytes in several and an index."""
    directory, linear = Path(directory), {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Linear)}
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: t for name, t in model.state_dict().items() if ".lora_" not in name}
    sizes = {name: t.numel() * (dtype or t.dtype).itemsize for name, t in state.items()}
    shards = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    one = len(shards) == 1
    files = [WEIGHTS if one else f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards):  # merged shard by shard: all at once would take the decoder's size again
        part = {n: (linear[n].merged() if n in linear else state[n]).to("cpu", dtype).contiguous() for n in names}
        write_atomically(directory / file, lambda p: save_file(part, p, metadata={"format": "pt"}))
    if not one:
        listed = {name: file for file, names in zip(files, shards) for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed})
    (directory / (INDEX if one else WEIGHTS)).unlink(missing_ok=True)  # of an earlier save in the other form
    config = config_to_json(model.config) | {"torch_dtype": str(dtype or model.language_model.lm_head.weight.dtype)[6:]}
    config["text_config"] |= {"bos_token_id": tokenizer.bos, "eos_token_id": sorted(tokenizer.stop_ids),
                              "pad_token_id": tokenizer.pad}  # transformers' default, 128004, is no row of a small model
    write_json(directory / "config.json", config)
    write_atomically(directory / "tokenizer.json", lambda p: tokenizer.bpe.save(str(p)))


def save_adapter(model, directory, base):
    """Write the LoRA tensors as PEFT does, with the hub's names, and modules listed in both layouts: so PEFT finds them
    whichever transformers it meets. `base` is the model directory that they belong to."""
    directory, adapted = Path(directory), {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.lora_A}
    if not adapted:
        raise ValueError("the model has no adapter to save.")
    directory.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{name}.lora_{side}.weight": getattr(m, f"lora_{side}").weight.detach().cpu()
             for name, m in adapted.items() for side in "AB"}
    new = [new + name[len(hub):] for name in adapted for new, hub in LAYOUTS if f"{name}.".startswith(hub)]
    first = next(iter(adapted.values()))
    rank = first.lora_A.out_features
    write_atomically(directory / ADAPTER, lambda p: save_file(state, p, metadata={"format": "pt"}))
    write_json(directory / ADAPTER_CONFIG, {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "bias": "none", "task_type": "CAUSAL_LM",
        "lora_alpha": first.lora_scale * rank, "target_modules": [*adapted, *new]})


def _file(directory, name):
    """Path of a regular file in a directory. A link may leave it only as the hub's cache has it: to ../../blobs."""
    if not isinstance(name, str) or not 0 < len(name) < 200 or set(name) & set("/\\\0") or name in (".", ".."):
        shown = repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
        raise ValueError(f"{directory}: the index names {shown} as a shard; it must name plain files of this directory.")
    path, home = directory / name, os.path.realpath(directory)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing or no regular file; copy or download the directory again.")
    if os.path.dirname(os.path.realpath(path)) not in (home, os.path.realpath(f"{home}/../../blobs")):
        raise ValueError(f"{path} is a link out of its directory; put the file itself there.")
    return path


def _once(pairs):
    """For json.loads: a dict, unless an entry is there twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("an entry is there twice")
    return dict(pairs)


def read_json(path):
    """A JSON file of at most 1 MB, or a ValueError that names it."""
    try:
        if os.path.getsize(path) > 1_000_000:
            raise ValueError("it is over 1 MB")
        return json.loads(Path(path).read_text("utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or is not JSON ({str(error)[:120]}); copy or download it again.") from None


def read_header(path):
    """Header of a safetensors file as {name: (dtype, shape, first byte in the file)}; no tensor is read.

    By hand rather than by the library, so that any damage is found before memory is taken, and has its sentence: the
    header's length in 8 bytes, the header in JSON, then the tensors without gaps. Raises ValueError.
    """
    found, end = {}, 0
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if length > min(size - 8, 2**22):
                raise ValueError("its header is longer than the file or 4 MB")
            header = json.loads(file.read(length), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if kind not in DTYPES:
                raise ValueError(f"tensor {name[:120]!r} is of type {str(kind)[:20]!r}, not {', '.join(DTYPES)}: take the "
                                 "model from before it was quantized")
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            if not whole or start != end or stop - start != math.prod(shape) * DTYPES[kind].itemsize:
                raise ValueError(f"tensor {name[:120]!r} does not lie where its type and shape put it")
            found[name], end = (DTYPES[kind], shape, 8 + length + start), stop
        if end != size - length - 8:
            raise ValueError(f"it has {size:,} bytes and should have {8 + length + end:,}: it was cut off or added to")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, (OSError, ValueError)) else "its header is damaged"
        raise ValueError(f"{path} cannot be read as a safetensors file ({reason}); copy or download it again.") from None
    return found


def read_tensors(path, header, targets):
    """Fill targets[name] (any float type, any device) from a file with `header`, with at most 4 MB of other memory.

    Read, not mapped: a mapping would count twice while it is copied, and change if someone wrote to the file.
    """
    with open(path, "rb") as file:
        for name, (dtype, _, offset) in header.items():
            file.seek(offset)
            for part in targets[name].view(-1).split(2**20):
                direct = part.dtype == dtype and part.device.type == "cpu"
                buffer = part if direct else torch.empty(len(part), dtype=dtype)
                if file.readinto(buffer.view(torch.uint8).numpy()) != buffer.nbytes:
                    raise ValueError(f"{path} ends within tensor {name!r}; copy or download it again.")
                if not direct:
                    part.copy_(buffer)


def load_tokenizer(directory):
    """The Tokenizer of a model directory."""
    path = _file(Path(directory), "tokenizer.json")
    try:
        if path.stat().st_size > 100_000_000:
            raise ValueError("it is over 100 MB")
        tokenizer = Tokenizer(BPE.from_file(str(path)))
        tokenizer.turn("", image=True)  # asks for all special tokens of the chat format
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception for a damaged file, and panics at some
        raise ValueError(f"{path} cannot be used as a tokenizer ({str(error)[:120]}); copy it again.") from None


def find_weights(directory, file=WEIGHTS):
    """{path: header} of a model's or an adapter's directory, with the hub's names: one file, or the shards that its index
    lists. Raises ValueError also for a tensor that is there twice."""
    found, seen, files = {}, {}, [(file, None)]
    if file == WEIGHTS and not os.path.exists(directory / WEIGHTS) and os.path.exists(directory / INDEX):
        index, shards = read_json(_file(directory, INDEX)), {}
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{directory / INDEX} has no weight_map of tensors to files; copy or download it again.")
        for name, shard in listed.items():
            shards.setdefault(_file(directory, shard).name, set()).add(name)
        files = list(shards.items())
    for file, names in files:
        path = _file(directory, file)
        header = read_header(path)
        for name in sorted(header.keys() ^ names) if names else ():
            raise ValueError(f"{path} {'lacks' if name in names else 'has an unlisted'} tensor {name[:120]!r}, unlike "
                             f"{INDEX}; copy or download both again.")
        for name in header:
            if hub_name(name) in seen:
                raise ValueError(f"{path} has tensor {name[:120]!r}, as has {seen[hub_name(name)]}; keep one of the two.")
            seen[hub_name(name)] = file
        found[path] = {hub_name(name): entry for name, entry in header.items()}
    return found


def _check_tensors(files, wanted):
    """Compare names and shapes in {path: header} with {name: shape}."""
    found = {name: (path, shape) for path, header in files.items() for name, (_, shape, _) in header.items()}
    for name in sorted(wanted.keys() ^ found.keys()):
        if name in found:
            raise ValueError(f"{found[name][0]} has an unknown tensor {name[:120]!r}; it belongs to another model.")
        raise ValueError(f"{next(iter(files)).parent} lacks tensor {name!r} of its configuration; copy or download it again.")
    for name, shape in wanted.items():
        if found[name][1] != shape:
            raise ValueError(f"{found[name][0]}: tensor {name} has shape {found[name][1]}, but the configuration asks "
                             f"for {shape}; take both from the same model.")


def read_adapter(directory):
    """(rank, alpha, modules, base directory) of an adapter in PEFT's format; modules are the listed names, if any."""
    path = _file(directory, ADAPTER_CONFIG)
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe a LoRA adapter (peft_type must be \"LORA\").")
    for name in [name for name in NOT_BUILT if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none"):
        raise ValueError(f"{path} asks for {name}, which is not built here; merge it with PEFT and load the result.")
    rank, alpha = (_number(f"{path}: {key}", config.get(key), kind) for key, kind in (("r", int), ("lora_alpha", float)))
    modules, base = config.get("target_modules"), config.get("base_model_name_or_path")
    if not isinstance(modules, (str, list)) or not all(isinstance(m, str) for m in modules):
        raise ValueError(f"{path}: target_modules must be a text or a list of module names.")
    if isinstance(modules, str) or config.get("layers_to_transform") or config.get("exclude_modules"):
        modules = ()  # a pattern (never run: it could take for ever): then the file's own names are all there is to go by
    base = [b for b in (base, str(directory / base)) if os.path.isdir(b)] if isinstance(base, str) and base else []
    if not base:
        raise ValueError(f"{path}: base_model_name_or_path must name the directory of the base model; download that, "
                         "and put its path there.")
    alpha *= rank**0.5 if config.get("use_rslora") is True else 1
    return rank, alpha, set(map(hub_name, modules)), Path(base[0])


def load_model(directory, dtype=torch.float32, device="cpu"):
    """Model and Tokenizer of a directory: weights in the hub's layout, or an adapter and the base that it names.

    Each tensor is read into the model's own memory, in `dtype` on `device` (adapters float32). Raises ValueError with one
    sentence when anything is missing, damaged, misnamed or of another shape, before memory is taken.
    """
    directory, chain = Path(directory), []
    while os.path.exists(directory / ADAPTER_CONFIG):
        *adapter, base = read_adapter(directory)
        chain, directory = [(directory, *adapter), *chain], base
        if len(chain) > 8:
            raise ValueError(f"{directory} is an adapter of an adapter, and so on for ever; name a base that is a model.")
    if not os.path.exists(directory / "config.json"):
        raise ValueError(f"{directory} holds no model: it has no config.json.")
    config = config_from_json(read_json(_file(directory, "config.json")))
    tokenizer = load_tokenizer(directory)
    if max(tokenizer.bpe.get_vocab().values()) >= config.text.vocab_size + 8:
        raise ValueError(f"{directory / 'tokenizer.json'} has more tokens than the embedding has rows; take this model's.")
    with torch.device("meta"):
        model = LlamaVision(config).to(dtype)
    files, adapters = find_weights(directory), [find_weights(place, ADAPTER) for place, *_ in chain]
    _check_tensors(files, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    for (_, rank, _, modules), adapter in zip(chain, adapters):
        _check_tensors(adapter, {f"{name}.lora_{side}.weight": shape for name, m in adapted_modules(model, modules, adapter).items()
                                 for side, shape in (("A", (rank, m.in_features)), ("B", (m.out_features, rank)))})
    try:
        model.to_empty(device=device)
    except RuntimeError:
        size = sum(p.nbytes for p in model.parameters()) / 1e9
        raise ValueError(f"{device} has no room for {directory}: {size:.1f} GB as {str(dtype)[6:]}.") from None
    for path, header in files.items():
        read_tensors(path, header, model.state_dict())
    for (_, rank, alpha, modules), adapter in zip(chain, adapters):
        merge_lora(model)  # an adapter that was trained on top of another counts that as its base
        model.requires_grad_(False)
        for module in adapted_modules(model, modules, adapter).values():
            module.add_lora(rank, alpha)
        for path, header in adapter.items():
            read_tensors(path, header, model.state_dict())
    return model, tokenizer


def adapted_modules(model, modules, files):
    """{name: Linear} of what an adapter changes: PEFT adapts what a listed name is the end of; else the file's names count."""
    listed, parts = {name.rpartition(".lora_")[0] for header in files.values() for name in header}, lambda name: name.split(".")
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and
            (name in listed or modules & {".".join(parts(name)[i:]) for i in range(len(parts(name)))})}


# ---------------------------------------------------------------- 10. Cost


def count_parameters(model):
    """Parameters of the decoder, the tower (with projector), the adapters, and those that are trained."""
    def total(parameters):
        return sum(p.numel() for p in parameters)
    adapters = total(p for n, p in model.named_parameters() if ".lora_" in n)
    vision = total(model.vision_model.parameters()) + total(model.multi_modal_projector.parameters())
    return {"decoder": total(model.language_model.parameters()) - adapters, "vision": vision, "adapters": adapters,
            "trained": total(p for p in model.parameters() if p.requires_grad)}


def text_flops(config, start, end, scored, images=0):
    """Forward FLOPs of tokens start .. end - 1 of one sequence whose first `start` are cached and that sees `images`.

    2 per weight and token of the layers, 4 E per head, query and key for the attention, and lm_head on the `scored`
    positions whose logits are needed. Cross layers are skipped without an image; lookups are free.
    """
    c, crossing = config.text, len(config.text.cross_attention_layers)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    mlp, pairs = 3 * c.intermediate_size, (end * (end + 1) - start * (start + 1)) // 2
    own = 2 * c.hidden_size * (2 * q + 2 * kv + mlp) * (end - start) + 4 * q * pairs
    cross = (end - start) * (2 * c.hidden_size * (2 * q + mlp) + 4 * q * images * image_tokens(config))
    return (c.num_hidden_layers - crossing) * own + (crossing * cross if images else 0) + 2 * c.hidden_size * c.vocab_size * scored


def image_tokens(config):
    """Tokens that one image takes in cross attention: all of its tile slots, empty ones too."""
    return config.vision.max_num_tiles * config.vision.tokens


def image_flops(config):
    """(tower, projector and keys and values of the cross layers): forward FLOPs of encoding one image."""
    c, v = config.text, config.vision
    slots = v.max_num_tiles * (v.tokens + -v.tokens % 8)
    layer = 2 * slots * v.hidden_size * (4 * v.hidden_size + 2 * v.intermediate_size) + 4 * v.hidden_size * slots**2
    tower = (v.num_hidden_layers + v.num_global_layers) * layer + 2 * image_tokens(config) * v.hidden_size * 3 * v.patch_size**2
    keys = len(c.cross_attention_layers) * 2 * c.num_key_value_heads * c.head_dim
    return tower, 2 * image_tokens(config) * c.hidden_size * (v.output_dim + keys)


def training_flops(forward, frozen=False, recompute=False):
    """Forward and backward together: backward costs twice the forward, once when the weights are frozen (LoRA: their
    gradients are not needed; the adapters' own cost, about 1 %, is left out); recompute adds one forward."""
    return forward * (1 + (1 if frozen else 2) + (1 if recompute else 0))


def parameter_parts(model):
    """{part of the model: (parameters, tensors)}, adapters apart."""
    parts, cross = {}, model.config.text.cross_attention_layers
    for name, p in model.named_parameters():
        keys = name.split(".")
        part = keys[-2] if keys[0] == "language_model" else keys[0]
        if keys[0::2][:2] == ["language_model", "layers"]:
            part = "cross layers" if int(keys[3]) in cross else "self layers"
        part = "adapters" if ".lora_" in name else part
        parts[part] = tuple(map(sum, zip(parts.get(part, (0, 0)), (p.numel(), 1))))
    return parts


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, each storage once: `live` now, and `peak`."""

    def __init__(self, known):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, WeakIdKeyDictionary({t.untyped_storage(): None for t in known})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False  # "is any value wrong?" of tensors that have none
        out = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage not in self.seen:
                self.seen[storage] = weakref.finalize(storage, self._add, -storage.nbytes())
                self._add(storage.nbytes())
        return out

    def _add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


# AdamW: bytes of state per trained parameter. float32: two moments, and a float32 copy of bfloat16 weights.
OPTIMIZER = {"float32": 8, "bfloat16": 4}


def estimate_memory(config, a):
    """{"training", "recompute", "rollout": {use: bytes}}; `a` holds the flags of parse_args.

    What stays is a product of sizes. Activations are counted: this file's own forward and backward run on tensors
    without data (torch's FakeTensorMode), and what is alive at the worst moment is added up. Not in it: what a training
    pass saves where rows share prompts (`log_probs`); sampling, fragmentation of the allocator, the CUDA context,
    workspaces of kernels.
    """
    c, dtype, columns = config.text, getattr(torch, a.dtype), {}
    with torch.device("meta"):
        model = LlamaVision(config).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if a.lora_rank:
            add_lora(model, a.lora_rank, 1.0)
        trained, parts = [p for p in model.parameters() if p.requires_grad], parameter_parts(model)
        for p in trained:
            p.grad = torch.zeros_like(p)  # they stay from one micro-batch to the next
        gradients = sum(p.grad.nbytes for p in trained)
        for name in ("training", "recompute"):
            model.recompute(name == "recompute")
            with Meter([*model.parameters(), *(p.grad for p in trained)]) as meter:
                prompts = max(1, a.micro_batch // a.group)
                kept = _trace(model, a, a.micro_batch, prompts, a.prompt_tokens + a.new_tokens, a.new_tokens, meter)
            columns[name] = {"gradients": gradients, "kept for backward": kept, "other activations": meter.peak - kept}
        with torch.no_grad(), Meter(model.parameters()) as meter:  # the images and prompts of all groups at once
            _trace(model, a, a.batch // a.group, a.batch // a.group, a.prompt_tokens, 1, meter)
    pair = 2 * c.num_key_value_heads * c.head_dim * dtype.itemsize  # a key and a value of one token in one layer
    seen = a.batch // a.group * a.images * config.vision.max_num_tiles * config.vision.tokens  # image tokens, each image once
    cross, features = len(c.cross_attention_layers), seen * c.hidden_size * dtype.itemsize
    columns["rollout"] = {"KV cache": a.batch * (a.prompt_tokens + a.new_tokens) * (c.num_hidden_layers - cross) * pair,
                          "cross-attention K/V": seen * cross * pair, "image features": features,
                          "other activations": meter.peak - features}
    state = OPTIMIZER[a.optimizer_state] + 4 * (a.optimizer_state == "float32" and trained[0].dtype != torch.float32)
    adapters = parts.pop("adapters", (0, 0))[0]
    both = {"weights": sum(n for n, _ in parts.values()) * dtype.itemsize, "adapters": adapters * 4,
            "optimizer": sum(p.numel() for p in trained) * state}
    return {name: both | column for name, column in columns.items()}


def _trace(model, a, rows, prompts, length, scored, meter):
    """Forward pass of rows of `length` tokens with the images of `prompts` prompts, backward too when gradients are on.
    Returns the bytes alive in between."""
    v, gate, image = model.config.vision, model.vision_model.class_embedding, None
    if a.images:
        tiles = gate.new_zeros(prompts * a.images, v.max_num_tiles, 3, v.image_size, v.image_size)
        with torch.set_grad_enabled(gate.requires_grad and torch.is_grad_enabled()):
            ids = torch.zeros(len(tiles), dtype=torch.long)
            features = model.image_features(tiles, ids, torch.zeros(tiles.shape[:2]))
        del tiles  # as `encode_images` lets them go
        features = features.unflatten(0, (-1, a.images)).flatten(1, 2)
        with unset_fake_temporarily():  # which row has which set must be known
            real = (torch.arange(v.max_num_tiles) < a.tiles).expand(len(features), a.images, -1)
            image = ImageContext(features, real, torch.arange(rows) * len(features) // rows)
    hidden = model(torch.zeros(rows, length, dtype=torch.long), image=image)
    loss = model.logits(hidden[:, -scored:]).log_softmax(-1)[..., 0].sum()
    kept = meter.live
    if loss.requires_grad:
        loss.backward()
    return kept


# ---------------------------------------------------------------- 11. Command line

COUNTS = {"batch": (64, 1, 4096, "rows of a rollout"), "micro-batch": (8, 1, 4096, "rows of a training pass"),
          "group": (1, 1, 4096, "rows that share a prompt and its images"), "images": (1, 0, 16, "images of a prompt"),
          "tiles": (4, 1, 4, "tiles of an image; all 4 slots are kept"), "prompt-tokens": (256, 1, 2**17, "of a prompt"),
          "new-tokens": (64, 1, 2**17, "of an answer"), "lora-rank": (32, 0, 4096, "of the adapters; 0: full fine-tuning")}


def _refuse(message):
    raise ValueError(f"{message}; --help lists the flags.")


def parse_args(argv=None):
    """Flags of `python model.py`. Raises ValueError with one sentence for numbers out of range."""
    parser = argparse.ArgumentParser(prog="model.py", description="Parameters by part, memory by use: an estimate.")
    parser.error = _refuse
    parser.add_argument("--dry-run", action="store_true", required=True, help="no weights are made or read")
    parser.add_argument("--size", choices=SIZES, default="11b", help="architecture (default 11b)")
    for name, (default, _, _, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--recompute", action="store_true", help="leave out the column without gradient checkpointing")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--optimizer-state", choices=OPTIMIZER, default="float32", help="AdamW's moments; bfloat16: as "
                        "train_sft.py --optimizer adamw16 has them")
    a = parser.parse_args(argv)
    for name, (_, least, most, _) in COUNTS.items():
        if not least <= getattr(a, name.replace("-", "_")) <= most:
            raise ValueError(f"--{name} must be from {least} to {most}.")
    if a.batch % a.group or max(a.micro_batch, a.group) % min(a.micro_batch, a.group):
        raise ValueError("--batch must be a multiple of --group; --micro-batch a multiple or a part of it.")
    return a


def main(argv=None):
    """The dry run: prints the estimate and returns {column: {use: bytes}}."""
    a = parse_args(argv)
    with torch.device("meta"):
        parts = parameter_parts(LlamaVision(SIZES[a.size]))
    for part, (count, tensors) in (parts | {"all": tuple(map(sum, zip(*parts.values())))}).items():
        print(f"{part:24}{count:>16,} parameters in {tensors:>3} tensors")
    print("\nGB (10^9 bytes) with", ", ".join(f"{key} {value}" for key, value in vars(a).items() if type(value) is not bool))
    columns = estimate_memory(SIZES[a.size], a)
    if a.recompute:
        del columns["training"]
    totals = [sum(column.values()) / 1e9 for column in columns.values()]
    lines = {"": columns} | {use: [f"{c.get(use, 0) / 1e9:.3f}" for c in columns.values()]
                             for use in columns["recompute"] | columns["rollout"]}
    lines |= {"all": [f"{total:.3f}" for total in totals]}
    lines |= {f"fits in {limit} GB": ["yes" if total <= limit else "no" for total in totals] for limit in (80, 141)}
    for label, cells in lines.items():
        print(f"{label:24}" + "".join(f"{cell:>12}" for cell in cells))
    print("An estimate, not measured on a GPU: fragmentation, the CUDA context and kernels' workspaces are not counted.\n"
          "A board holds about 6 % more than its name says, which is left for these.")
    return columns


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)

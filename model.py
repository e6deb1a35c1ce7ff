"""Llama-3.2-Vision by hand: one set of classes for `tiny` (two CPU cores), `small` and the `11b`.

Contents
  1. Layers of the decoder, 2. the whole model, 3. generation; the rest can be skipped
  4. Configuration, 5. LoRA  sizes, the hub's config.json; adapters on and off
  6. Images in the decoder   which token sees which image
  7. Cache                   keys and values of earlier tokens; prompts kept once; CUDA graphs
  8. Batches                 padding; the training pass computes a group's prompt once
  9. Vision tower            tiles -> patches -> layers -> six stacked feature maps
 10. Pictures                any picture -> 8-bit RGB -> a canvas of up to four tiles
 11. Tokenizer and chat      text never becomes a special token
 12. Saving, 13. loading, 14. files of others, 15. cost in FLOPs

Shapes: B rows, T new tokens, S cache slots, D hidden, H query heads, K key/value heads, E head
size, V vocabulary; R sets of I images, M tile slots of an image, L pixels of a tile, P tokens
of a tile, N image tokens of a set, C hidden size of the tower. Modules have the hub's names, so a
checkpoint loads with strict=True. Where transformers differs from Meta's code, we follow Meta.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tempfile
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as BPE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# On a GPU lengths are rounded up, so that shapes come again, and so does their memory; and at most
# so many numbers are read by an MLP, or logits drawn from, at a time.
MULTIPLE, AT_ONCE = {"cuda": 32}, 2**21
# cuDNN's attention takes 0.1 s to plan each new shape, and lengths of text are always new.
torch.backends.cuda.enable_cudnn_sdp(False)

# ---- 1. Layers of the decoder --------------------------------------------------------------------


@dataclass(frozen=True)
class TextConfig:
    """The decoder. The defaults are the 11B's; names are those of the hub's `text_config`."""

    vocab_size: int = 128256  # rows of lm_head; the embedding has 8 more, the first is <|image|>
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
        return self.hidden_size // self.num_attention_heads


class Linear(nn.Linear):
    """A linear layer that can carry a low-rank adapter, W x + (alpha / rank) B (A x), B zero first
    (Hu et al., arXiv 2106.09685). The adapter is float32 beside weights of any type. W is never
    written to: rounding errors of adapters that go in and out would pile up in bfloat16."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias)
        self.lora_A = self.lora_B = None
        self.lora_scale, self.lora_on, self.cast = 0.0, True, None

    def add_lora(self, rank, alpha):
        """Freeze W and add A (rank, in), B (out, rank)."""
        self.requires_grad_(False)
        to = {"bias": False, "device": self.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(self.in_features, rank, **to)
        self.lora_B = nn.Linear(rank, self.out_features, **to)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_scale = alpha / rank

    def cast_lora(self, dtype):
        """A and B in `dtype`. While `cast` holds them they are not cast again for each product."""
        return self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)

    def forward(self, x):
        if self.lora_A is None or not self.lora_on:
            return F.linear(x, self.weight, self.bias)
        A, B = self.cast or self.cast_lora(x.dtype)
        rows = x.flatten(0, -2)
        y = F.linear(rows, self.weight, self.bias)
        y = y.addmm_(F.linear(rows, A), B.T, alpha=self.lora_scale)
        return y.view(*x.shape[:-1], -1)

class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight (that order is the checkpoint's)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight


@lru_cache
def rope_frequencies(c, device="cpu"):
    """Inverse wavelengths (E/2,), float32. "llama3" divides low frequencies by `rope_factor` and
    blends in between (Llama 3.1's context extension)."""
    halves = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device) / c.head_dim
    inverse = c.rope_theta ** -halves
    turns = c.rope_original * inverse / (2 * math.pi)  # full turns within the original context
    plain = ((turns - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
    return inverse * (plain + (1 - plain) / c.rope_factor)


def rope_table(c, positions):
    """cos and sin (B, 1, T, E) of positions (B, T), sin's first half negative, for `rotate`.
    In float32: in bfloat16 neighbours beyond position 256 would be one."""
    frequencies = rope_frequencies(c, positions.device)
    angles = (positions[..., None].float() * frequencies)[:, None]  # (B, 1, T, E/2)
    angles = torch.cat([-angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """RoPE (Su et al., arXiv 2104.09864) on x (B, heads, T, E): the halves of a head are real and
    imaginary parts ("rotate_half")."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def split_heads(x, heads):
    """(B, T, heads * E) -> (B, heads, T, E)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def grouped_attention(q, k, v, mask):
    """q (B, H, T, E) over k, v (B, K, S, E) -> (B, T, H * E), H a multiple of K (Ainslie et al.,
    arXiv 2305.13245). Query heads that share a key head become more queries of it, so k and v are
    not repeated. mask (B, 1, T or 1, S): True where seen; None: all is seen."""
    B, H, T, E = q.shape
    share = H // k.shape[1]
    q = q.reshape(B, k.shape[1], share * T, E)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, share, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(B, H, T, E).transpose(1, 2).flatten(2)


def causal_attention(q, k, v, mask):
    """The same where mask None means causal among the T tokens, which needs none."""
    if mask is not None:
        return grouped_attention(q, k, v, mask)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The projections of grouped-query attention: H query heads, K key and value heads."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        D, q, kv = c.hidden_size, self.heads * c.head_dim, self.kv_heads * c.head_dim
        self.q_proj, self.k_proj, self.v_proj = Linear(D, q), Linear(D, kv), Linear(D, kv)
        self.o_proj = Linear(q, D)


class SelfAttention(Attention):
    """Causal grouped-query attention with RoPE."""

    def forward(self, x, rope, mask=None, attend=None):
        """x (B, T, D). mask None: causal. attend(q, k, v): attention to what a cache holds too."""
        q = rotate(split_heads(self.q_proj(x), self.heads), rope)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), rope)
        v = split_heads(self.v_proj(x), self.kv_heads)
        attend = attend or partial(causal_attention, mask=mask)
        return self.o_proj(attend(q, k, v))


class CrossAttention(Attention):
    """Text queries over image keys: no RoPE, not causal, an RMSNorm on every query and key head."""

    def __init__(self, c):
        super().__init__(c)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps) for _ in range(2))

    def keys_values(self, features):
        """features (R, N, D) -> k (normed), v (R, K, N, E), for all tokens to come."""
        return (self.k_norm(split_heads(self.k_proj(features), self.kv_heads)),
                split_heads(self.v_proj(features), self.kv_heads))

    def forward(self, x, keys_values, image, mask):
        """x (B, T, D). Rows that share a set of images are queries of the same keys."""
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        out = grouped_attention(image.fold(q), *keys_values, mask)
        return self.o_proj(image.unfold(out[:, None])[:, 0])

class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        large = x.numel() > AT_ONCE and len(x) > 1 and x.device.type in MULTIPLE
        if large and not torch.is_grad_enabled():  # it makes three of intermediate_size
            return torch.cat([self(rows) for rows in x.split(max(1, AT_ONCE // x[0].numel()))])
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SelfLayer(nn.Module):
    """h + attention(norm h), then h + MLP(norm h)."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, h, rope, mask=None, attend=None):
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, attend)
        return h + self.mlp(self.post_attention_layernorm(h))


class CrossLayer(nn.Module):
    """The same with cross attention, each branch behind tanh of a learned gate. Gates are zero in a
    fresh model, which then ignores images: assets/make_base.py opens them."""

    def __init__(self, c, mask_prefix_attention):
        super().__init__()
        self.cross_attn, self.mlp = CrossAttention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))
        self.mask_prefix_attention = mask_prefix_attention

    def forward(self, h, image, mask, sees, keys_values=None):
        """h (B, T, D); mask and sees of ImageContext.visible; keys_values: ready ones or None.
        A token that sees no image gets nothing from this layer."""
        if keys_values is None:
            keys_values = self.cross_attn.keys_values(image.features)
        attention, mlp = self.cross_attn_attn_gate.tanh(), self.cross_attn_mlp_gate.tanh() * sees
        attention = attention * sees if self.mask_prefix_attention else attention
        h = h + attention * self.cross_attn(self.input_layernorm(h), keys_values, image, mask)
        return h + mlp * self.mlp(self.post_attention_layernorm(h))


class TextModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config.text
        self.embed_tokens = Embedding(c.vocab_size + 8, c.hidden_size)
        self.layers = nn.ModuleList(
            CrossLayer(c, config.mask_prefix_attention) if i in c.cross_attention_layers
            else SelfLayer(c) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.recompute = False

    def forward(self, ids, positions, mask, image=None, cache=None):
        """ids, positions (B, T) -> hidden states (B, T, D). mask (B, 1, T, S), None: causal. image:
        an ImageContext. A cache knows the positions and images of its rows itself."""
        h = self.embed_tokens(ids)
        image = image if cache is None else cache.image
        rope = rope_table(self.config, positions) if cache is None else cache.rope
        rope = [part.to(h.dtype) for part in rope]
        if image is not None:
            shown = ids == self.config.vocab_size  # <|image|>: the first id behind the vocabulary
            mask_and_sees = (image if cache is None else cache).visible(shown)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SelfLayer):
                attend = None if cache is None else partial(cache.attend, i)
                h = run_layer(self, layer, h, rope, mask, attend)
            elif image is not None:  # without an image the layer would add zero
                h = run_layer(self, layer, h, image, *mask_and_sees, image.cross.get(i))
        return self.norm(h)


def run_layer(owner, layer, *args):
    """Call a layer; if `owner.recompute`, keep only its input for backward (arXiv 1604.06174)."""
    if owner.recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


# ---- 2. The whole model --------------------------------------------------------------------------


class LlamaVision(nn.Module):
    """Llama-3.2-Vision: vision tower, projector, decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.multi_modal_projector = Linear(config.vision.output_dim, config.text.hidden_size, True)
        self.language_model = nn.ModuleDict({
            "model": TextModel(config),
            "lm_head": Linear(config.text.hidden_size, config.text.vocab_size)})

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def trains_vision(self) -> bool:
        """Is anything before the decoder trained? Then each pass encodes images, with gradient."""
        return any(p.requires_grad for n, p in self.named_parameters() if "language_model" not in n)

    def recompute(self, on: bool = True):
        """Gradient checkpointing in every layer: less memory for one more forward pass."""
        self.vision_model.recompute = self.language_model.model.recompute = on

    def encode_images(self, tiles: Tensor, ratio_ids: Tensor, rows: Tensor | None = None):
        """ImageContext.encode, to be called under no_grad unless `trains_vision`."""
        return ImageContext.encode(self, tiles, ratio_ids, rows)

    def forward(self, ids: Tensor, image: ImageContext | None = None) -> Tensor:
        """Hidden states (B, T, D) of ids (B, T) after the final norm. Rows may be padded on the
        right. ValueError when a row has more <|image|> tokens than images."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.language_model.model(ids, positions, None, image)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        return self.language_model.lm_head(hidden).float()

    def log_probs(self, ids: Tensor, chosen: Tensor, temperature: float = 1.0,
                  image: ImageContext | None = None) -> Tensor:
        """Log-probabilities of the tokens ids[b, t] with chosen[b, t], given all before them.

        ids (B, T) padded on the right, chosen (B, T) bool, never True at t = 0 -> (number chosen,)
        float32 in row-major order, of softmax(logits / temperature): the distribution that was
        sampled from, so that the ratio to `old_log_probs` is 1 before an update."""
        # States self(ids[:, :-1], image)[chosen[:, 1:]], since t - 1 predicts token t; a prompt
        # that rows share is computed once. No others reach lm_head: 1 MB of logits each in the 11B.
        hidden = states_before(self, ids, chosen, image)
        log_p = (self.logits(hidden) / temperature).log_softmax(-1)
        return log_p.gather(1, ids[:, 1:][chosen[:, 1:]][:, None])[:, 0]

    def extend(self, cache: Cache, ids: Tensor, lengths: Tensor) -> Tensor:
        """Feed ids (B, T), the first `lengths` (B,) of each row real, after the tokens of `cache`.
        Returns logits (B, V) in the weights' type behind the last real token of each row. Padding
        goes to slots behind the row's end, which a later token overwrites before any query sees
        them."""
        cache.next_slots(ids.shape[1])
        hidden = self.language_model.model(ids, None, None, cache=cache)
        cache.length += lengths
        if ids.shape[1] > 1:
            last = (lengths - 1).clamp(min=0)[:, None, None]
            hidden = hidden.take_along_dim(last, 1)
        return self.language_model.lm_head(hidden[:, 0])


# ---- 3. Generation -------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int = 64
    temperature: float = 1.0  # 0 = greedy
    generator: torch.Generator | None = None
    batch: int = 256  # episodes computed side by side: memory, and which answers are drawn


def sample(logits: Tensor, temperature: float, point: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (B, V), and its log-probability, both (B,). point (B, 1)
    float64: uniform random numbers. temperature 0: the likeliest token, with its log-probability at
    temperature 1."""
    log_p = logits.float()
    log_p = (log_p if temperature in (0, 1) else log_p / temperature).log_softmax(-1)
    if temperature == 0:
        token = log_p.argmax(-1)
    else:
        # A row's number is looked up in its cumulated probabilities: the device need not answer. A
        # float32 sum of 128,256 of them is off by more than rare tokens weigh.
        total = log_p.exp().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(total, point * total[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)
    return token, log_p.gather(1, token[:, None])[:, 0]


@torch.inference_mode()
def generate(model: LlamaVision, cache: Cache, logits: Tensor, sampling: Sampling,
             stop_ids: set[int]) -> tuple[list, list]:
    """Sample a response for every row of `cache`, whose next-token logits (B, V) are given.

    A row ends with a token of stop_ids, which belongs to its response, or after max_new_tokens.
    Returns lists of token ids and lists of their log-probabilities, one a row. The cache then holds
    all tokens of a response but its last: continue with `extend`.
    """
    cache.reserve(sampling.max_new_tokens)
    before = cache.length.clone()
    stops = torch.tensor(sorted(stop_ids), device=logits.device)
    running = torch.ones_like(before, dtype=torch.bool)
    token, log_p = torch.zeros_like(before), torch.zeros_like(before, dtype=torch.float32)
    point = torch.zeros(len(logits), 1, dtype=torch.float64, device=logits.device)

    def draw(logits):  # in place, like all that a step changes: on a GPU a graph replays it
        size = max(1, AT_ONCE // logits.shape[1])
        for part in zip(*(x.split(size) for x in (logits, point, token, log_p))):
            for old, new in zip(part[2:], sample(part[0], sampling.temperature, part[1])):
                old.copy_(new)
        running.logical_and_((token[:, None] != stops).all(1))

    def step():  # finished rows are computed along but do not grow: their slot is written again
        draw(model.extend(cache, token[:, None], running.long()))

    drawn = []
    with cache.decoding(step, [stops, running, token, log_p, point], sampling.temperature) as step:
        for n in range(sampling.max_new_tokens):
            # Asking whether all rows are done makes the device wait: after every fourth token only.
            if n % 4 == 0 and not running.any():
                break
            if sampling.temperature:
                point.uniform_(generator=sampling.generator)  # not in the step: new at each replay
            step() if n else draw(logits)
            drawn.append((token.clone(), log_p.clone()))
    counts = (cache.length - before + 1).tolist()  # a response's last token was not fed
    tokens, log_probs = (torch.stack(part, 1) for part in zip(*drawn))
    tokens, log_probs = tokens.tolist(), finite(log_probs).tolist()
    return [t[:n] for t, n in zip(tokens, counts)], [p[:n] for p, n in zip(log_probs, counts)]


# ==== The reading path ends here. Everything below can be skipped. ====

# ---- 4. Configuration ----------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """The tower. The defaults are those of the 11B Instruct; names are those of the hub."""

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

    vision_taps: "input" (Meta: a tapped state enters the named layer) or "output" (transformers
    since 4.56: it leaves the layer). mask_prefix_attention: True (Meta: a token that sees no image
    gets nothing from a cross layer) or False (transformers: it still gets the attention's output).
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

# Entries of text_config and vision_config that would change the computation: only these are built.
FIXED = ({"hidden_act": "silu", "tie_word_embeddings": False},
         {"hidden_act": "gelu", "num_channels": 3, "max_num_tiles": 4,
          "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1],
                                      [4, 1]]})
# Names of the "llama3" entries of RoPE, on the hub and here.
ROPE = {"factor": "rope_factor", "low_freq_factor": "rope_low", "high_freq_factor": "rope_high",
        "original_max_position_embeddings": "rope_original"}
LIMITS = {"num_hidden_layers": 201, "num_global_layers": 201}  # numbers lie below; else below 2^21


def config_to_json(config):
    """The hub's config.json as a dict: what transformers' MllamaConfig reads."""
    text = asdict(config.text)
    vision = asdict(config.vision)
    scaling = {"rope_type": "llama3"} | {theirs: text.pop(ours) for theirs, ours in ROPE.items()}
    rope = {"rope_type": "default"} if config.text.rope_factor == 1.0 else scaling
    text |= {"model_type": "mllama_text_model", "rope_scaling": rope, "hidden_act": "silu"}
    vision |= {"model_type": "mllama_vision_model", "vision_output_dim": config.vision.output_dim}
    return {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"],
            "image_token_index": config.text.vocab_size, "text_config": text,
            "vision_config": vision, "vision_taps": config.vision_taps,
            "mask_prefix_attention": config.mask_prefix_attention}


def config_from_json(data):
    """Config from the hub's config.json (a dict); only known fields are read.

    transformers 5 writes RoPE as rope_parameters, before it was rope_scaling beside rope_theta.
    What the file leaves out has transformers' default (so 448 px, plain RoPE). Raises ValueError
    with one sentence when it is not a config of this architecture, asks for something that is not
    built here, or holds a number that is out of range.
    """
    if not isinstance(data, dict) or data.get("model_type") != "mllama":
        raise ValueError("config.json does not describe a Llama-3.2-Vision model "
                         "(model_type must be \"mllama\").")
    text = data.get("text_config")
    vision = data.get("vision_config")
    rope = {}
    if isinstance(text, dict):
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not all(isinstance(part, dict) for part in (text, vision, rope)):
        raise ValueError("config.json: text_config, vision_config, RoPE entry must be objects.")
    for part, fixed in zip((text, vision), FIXED):
        for name, value in fixed.items():
            if part.get(name, value) not in (value, None):
                raise ValueError(f"config.json: {name} must be {json.dumps(value)}: "
                                 "nothing else is built here.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or (kind == "llama3" and None in map(rope.get, ROPE)):
        raise ValueError('config.json: the RoPE entry must be "default", or "llama3" with '
                         f"{', '.join(ROPE)}.")
    entries = {name: value for name, value in text.items() if name not in ROPE.values()}
    names = {"rope_theta": "rope_theta"} | (ROPE if kind == "llama3" else {})
    entries |= {ours: rope[theirs] for theirs, ours in names.items() if theirs in rope}
    config = Config(_known(TextConfig(rope_factor=1.0), entries),
                    _known(VisionConfig(image_size=448), vision),
                    data.get("vision_taps", "input"), data.get("mask_prefix_attention", True))
    _check_config(config, data.get("image_token_index", config.text.vocab_size))
    return config


def _known(default, data):
    """A config dataclass with those entries of `data` that it names."""
    return replace(default, **{
        name: _number(f"config.json: {name}", value, type(getattr(default, name)), LIMITS.get(name))
        for name, value in data.items()
        if value is not None and name in default.__dataclass_fields__})


def _number(name, value, wanted, limit=None, above=0):
    """An entry of a JSON file as int, float or tuple of ints; NaN, texts, booleans are refused."""
    if wanted is tuple and isinstance(value, (list, tuple)) and len(value) <= 200:
        return tuple(_number(name, n, int, above=-1) for n in value)
    if type(value) not in (int, float) or wanted is tuple:
        kind = "a list of at most 200 numbers" if wanted is tuple else "a number"
        raise ValueError(f"{name} must be {kind}.")
    if not above < value < (limit or 2**21) or wanted(value) != value:
        raise ValueError(f"{name} is {str(value)[:40]}, which is out of range.")
    return wanted(value)


def _check_config(config, image_token):
    """Refuse numbers that do not fit together, before memory is taken for them."""
    text = config.text
    vision = config.vision
    switch = config.mask_prefix_attention
    for name, part in (("cross_attention_layers", text), ("intermediate_layers_indices", vision)):
        indices = getattr(part, name)
        layers = part.num_hidden_layers
        if list(indices) != sorted(set(indices)) or max(indices, default=0) >= layers:
            raise ValueError(f"config.json: {name} must be rising numbers below {layers}, "
                             "the number of layers.")
    for wrong, sentence in (
            (text.hidden_size % (2 * text.num_attention_heads)
             or text.num_attention_heads % text.num_key_value_heads,
             "the heads of the decoder do not divide its hidden size"),
            (vision.hidden_size % vision.attention_heads or vision.image_size % vision.patch_size,
             "the heads or patches of the vision tower do not divide its sizes"),
            (vision.tokens * vision.hidden_size > 2**36 or text.rope_high <= text.rope_low,
             "image_size, or high_freq_factor against low_freq_factor, is out of range"),
            (config.vision_taps not in ("input", "output") or type(switch) is not bool,
             'vision_taps must be "input" or "output", mask_prefix_attention true or false'),
            (image_token != text.vocab_size,
             "image_token_index must be vocab_size, the first id behind lm_head")):
        if wrong:
            raise ValueError(f"config.json: {sentence}.")


# ---- 5. LoRA -------------------------------------------------------------------------------------

PARTS = {"decoder": "language_model.model.", "projector": "multi_modal_projector",
         "tower": "vision_model."}


def add_lora(model: LlamaVision, rank: int, alpha: float, where=PARTS["decoder"]) -> int:
    """Adapters on every Linear whose name starts with `where` (one or a tuple; default: all of the
    decoder, not lm_head); everything else is frozen. Add them after loading weights. Returns the
    number of adapted layers."""
    model.requires_grad_(False)
    adapted = [m for name, m in linear_layers(model).items() if name.startswith(where)]
    if not adapted:
        raise ValueError(f"no linear layer's name starts with {where!r}: nothing to adapt.")
    for module in adapted:
        module.add_lora(rank, alpha)
    return len(adapted)


def linear_layers(model):
    """{name: Linear}."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def merged(linear):
    """W + (alpha / rank) B A in W's type, summed in float32 so that it rounds once."""
    if linear.lora_A is None:
        return linear.weight
    delta = linear.lora_scale * (linear.lora_B.weight @ linear.lora_A.weight)
    return (linear.weight.float() + delta).to(linear.weight.dtype)


@torch.no_grad()
def merge_lora(model: LlamaVision):
    """Add every adapter into its weights and take it out: the same model, all of it trainable
    again."""
    for linear in linear_layers(model).values():
        if linear.lora_A is not None:
            linear.weight.copy_(merged(linear))
            linear.lora_A = linear.lora_B = None
            model.requires_grad_(True)


@contextmanager
def adapters_off(model: LlamaVision):
    """Within this context the model is the one that the adapters started from: the reference
    policy, without a second copy of the weights."""
    layers = linear_layers(model).values()
    for linear in layers:
        linear.lora_on = False
    try:
        yield
    finally:
        for linear in layers:
            linear.lora_on = True


# ---- 6. Images in the decoder --------------------------------------------------------------------


class Shared:
    """Keys and values that rows of text have in common: R sets, and rows (B,): the set of each row.
    The rows of a set become its queries. With 2 prompts and groups of 3: R = 2, rows = [0, 0, 0, 1,
    1, 1], share = 3."""
    whole = True

    def arrange(self, rows, sets):
        """Find a place for each row among the `share` of its set."""
        same = rows[:, None] == rows
        self.rows, self.sets = rows, sets
        self.share = int(same.sum(1).max())  # rows of the set that has most
        self.slot = rows * self.share + same.tril(-1).sum(1)  # (B,): each row's of R * share
        self.even = self.slot.tolist() == [*range(sets * self.share)]  # nothing to move

    def fold(self, x):
        """(B, heads, T, E) of rows -> (R, heads, share * T, E) of sets. Slots without a row hold
        ones."""
        if not self.even:
            x = x.new_ones(self.sets * self.share, *x.shape[1:]).index_copy(0, self.slot, x)
        return x.unflatten(0, (-1, self.share)).transpose(1, 2).flatten(2, 3)

    def unfold(self, x):
        """(R, heads, share * T, E) of sets -> (B, heads, T, E) of rows."""
        x = x.unflatten(2, (self.share, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.even else x[self.slot]


@dataclass(eq=False)
class ImageContext(Shared):
    """The images that rows of text may see: R sets of up to I images, and the set of each row.

    features (R, I * M * P, D): projected image tokens; tiles (R, I, M) bool: those that exist; rows
    (B,) long: the set of each row of text, by default its own. prefix_looks: tokens before an image
    see everything (transformers). cross: {layer: [k, v] (R, K, N, E)} where `with_keys` has
    computed them.
    """

    features: Tensor
    tiles: Tensor
    rows: Tensor | None = None
    prefix_looks: bool = False
    cross: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.rows is None:
            self.rows = torch.arange(len(self.tiles), device=self.tiles.device)
        self.arrange(self.rows, len(self.tiles))
        self.whole = bool(self.tiles.all())

    @classmethod
    def encode(cls, model, tiles, ratio_ids, rows=None):
        """Of images as `pack_images` packs them: tiles (R, I, M, 3, L, L), ratio_ids (R, I), 0 = no
        image; None without any. rows (B,): the set of each row of text, by default its own."""
        if not ratio_ids.any():
            return None
        tiles = tiles.to(model.device)
        ratio_ids = ratio_ids.to(model.device)
        tiles_of_ratio = ratio_ids.new_tensor([0, *map(math.prod, RATIOS)])
        count = tiles_of_ratio[ratio_ids][..., None]  # (R, I, 1)
        slot = torch.arange(tiles.shape[2], device=model.device)
        # A missing image is encoded as one empty tile: with transformers' semantics, tokens before
        # an image attend to it.
        tile_mask = slot < count.clamp(min=1)
        states = model.vision_model(*(x.flatten(0, 1) for x in (tiles, ratio_ids, tile_mask)))
        features = model.multi_modal_projector(states).unflatten(0, ratio_ids.shape).flatten(1, 3)
        return cls(features, slot < count, rows, not model.config.mask_prefix_attention)

    def with_keys(self, model):
        """The same with keys and values for every cross layer."""
        layers = model.language_model.model.layers
        return replace(self, cross={i: layers[i].cross_attn.keys_values(self.features)
                                    for i in model.config.text.cross_attention_layers})

    def tensors(self):
        """What a decoding step reads."""
        return [self.rows, self.slot, self.tiles, *chain(*self.cross.values())]

    def change(self, rows, function):
        """The context for other rows, with function(x, d) of every tensor x whose dimension d has
        the images."""
        cross = {i: [function(x, 2) for x in pair] for i, pair in self.cross.items()}
        return replace(self, features=function(self.features, 1), tiles=function(self.tiles, 1),
                       rows=rows, cross=cross)

    def select(self, rows):
        """The context of the given rows of text (a LongTensor), without the sets that none of them
        uses."""
        sets, rows = self.rows[rows].unique(return_inverse=True)
        sets = slice(None) if len(sets) == len(self.tiles) else sets  # all of them: no copy
        return self.change(rows, lambda x, d: x[sets])

    def latest(self):
        """The context with the last image of each set only."""
        last = self.tiles.any(-1).cumsum(1).argmax(1)  # (R,)
        sets = torch.arange(len(last), device=last.device)
        count = self.tiles.shape[1]

        def of_last(x, d):
            return x.unflatten(d, (count, -1)).movedim(d, 1)[sets, last]
        return self.change(self.rows, of_last)

    def add(self, more, model):
        """The images of another context of the same rows after one's own, both with keys. Rows
        share from now on what both their old and new sets share."""
        (old, new), rows = torch.stack([self.rows, more.rows]).unique(dim=1, return_inverse=True)
        more = more.change(rows, lambda x, d: x[new]).with_keys(model)
        own = self.change(rows, lambda x, d: x[old])
        cross = {i: [torch.cat(parts, 2) for parts in zip(own.cross[i], more.cross[i])]
                 for i in own.cross}
        return replace(own, features=torch.cat([own.features, more.features], 1),
                       tiles=torch.cat([own.tiles, more.tiles], 1), cross=cross)

    def visible(self, shown, at=None):
        """shown (B, S) bool: where <|image|> stands; at (B, T): the positions asked for, by default
        all.

        A token sees the latest image up to itself, and those directly before that one in the same
        run of <|image|> tokens. Returns (mask (R, 1, share * T or 1, N) bool, True where seen, or
        None; sees (B, T, 1) bool). A token that sees nothing has a mask of ones (of -inf it would
        be NaN, in the gradient too), and `sees` discards its result.
        """
        # Tokens see the images first .. end of their row, counted from 1. Generated tokens too:
        # a mask of ones for them would show the empty tiles of pictures with fewer than four.
        end = shown.cumsum(1)
        begins = shown & ~F.pad(shown, (1, 0))[:, :-1]
        first = (begins * end).cummax(1).values
        if at is not None:
            first = first.gather(1, at)
            end = end.gather(1, at)
        tiles = self.tiles[self.rows]
        tokens = self.features.shape[1] // self.tiles[0].numel()
        number = tiles.any(-1).cumsum(1)  # (B, I): missing images are not counted
        # Not for single tokens of decoding: the question would make the CPU wait for the device.
        if end.shape[1] > 1 and bool((end[:, -1] > number[:, -1]).any()):
            raise ValueError("a row of text has more <|image|> tokens than it was given images.")
        number = number[:, None]
        seen = (number >= first[..., None]) & (number <= end[..., None])
        seen = (seen[..., None] & tiles[:, None]).flatten(2)  # (B, T, I * M)
        sees = seen.any(-1, keepdim=True)
        if self.tiles.shape[1] == 1 and not self.prefix_looks:  # one image: its tiles are the mask
            mask = (self.tiles | ~self.tiles.any(-1, keepdim=True))[:, None]  # (R, 1, 1, M)
            return (None if self.whole else mask.repeat_interleave(tokens, -1)), sees
        mask = (seen | ~sees).repeat_interleave(tokens, -1)  # (B, T, N)
        return self.fold(mask[:, None]), sees


def finite(log_probs: Tensor) -> Tensor:
    """The same, or a ValueError where one is NaN or infinite: no score may be made of them."""
    if not log_probs.isfinite().all():
        raise ValueError("the model's outputs are not finite: its weights are damaged, or its "
                         "training diverged. Take an earlier checkpoint or another model.")
    return log_probs


# ---- 7. Cache ------------------------------------------------------------------------------------


class SharedPrompt(Shared):
    """Prompts whose rows go on alone. kv: keys and values, {layer: (2, R, K, S0, E)}."""

    def __init__(self, kv, rows):
        sets, rows = rows.unique(return_inverse=True)
        whole = len(sets) == next(iter(kv.values())).shape[1]  # then nothing is copied
        self.kv = kv if whole else {i: kv[:, sets] for i, kv in kv.items()}
        self.arrange(rows, len(sets))

    def tensors(self):
        return [self.rows, self.slot, *self.kv.values()]

    def product(self, x, y):
        """x (B * K, n, m) of rows with y (R, K, m, S) of their prompts -> (B * K, n, S)."""
        folded = self.fold(x.unflatten(0, (len(self.rows), -1))).flatten(0, 1)
        return self.unfold(product(folded, y.flatten(0, 1)).unflatten(0, y.shape[:2])).flatten(0, 1)


def product(a, b):
    """a @ b, three-dimensional. On a GPU in float32 whatever the factors are: scores rounded to
    bfloat16 would shift the softmax."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


class Cache:
    """Keys and values of every self-attention layer, in slots: token t of a row lies in slot t
    whatever the other rows hold, so rows need not be equally long.

    length (B,): tokens of each row. Rows may see images, and share prompts: keys and values of an
    image are computed once for all rows that share it, for all their turns and tokens; those of a
    prompt are kept once for the rows that `select` makes of it. The first `start` (B,) tokens of
    such rows, at most `offset`, take none of their slots. `Prompts`, a cache with gradients, offers
    the decoder the same: image, rope, attend, visible.
    """

    def __init__(self, model: LlamaVision, rows: int, slots: int,
                 image: ImageContext | None = None):
        c, weight = model.config.text, model.language_model.lm_head.weight
        self.model, self.prompt, self.slots, self.offset = model, None, 0, 0
        self.fixed = weight.device.type in MULTIPLE  # attend to free slots too: few shapes
        shape = (2, rows, c.num_key_value_heads, 0, c.head_dim)  # keys and values
        self.kv = {i: weight.new_zeros(shape) for i in range(c.num_hidden_layers)
                   if i not in c.cross_attention_layers}
        self.heads = c.num_key_value_heads
        self.length, self.start = torch.zeros(2, rows, dtype=torch.long, device=weight.device)
        self.shown = self.length[:, None] > 0  # where <|image|> stands
        self.image = image and image.with_keys(model)
        self.reserve(slots)

    @torch.inference_mode(False)  # or later turns could not write to what `generate` reserves
    def reserve(self, count: int) -> Cache:
        """Make room for `count` more tokens in every row. It asks the device: once a turn."""
        self.used = int((self.length - self.start).max())
        slots = rounded(self.used + count, self.length.device)
        if slots > self.slots:
            some = next(iter(self.kv.values()))
            shape = (*some.shape[:3], slots, some.shape[4])
            # The last graph's memory is free between two rollouts: used again, or given back.
            spare = getattr(GRAPHS.get(self.model), "kv", {}).get(shape)
            if not spare:
                GRAPHS.pop(self.model, None)
            for i, kv in self.kv.items():
                self.kv[i] = spare[i].zero_() if spare else kv.new_zeros(shape)
                self.kv[i][:, :, :, : self.slots] = kv
            self.shown = F.pad(self.shown, (0, slots - self.slots))
            self.slots = slots
        return self

    def next_slots(self, count):
        """Slots for the next `count` tokens of each row, and what these see. ValueError: not
        reserved."""
        self.used += count  # an upper bound of the fullest row, without asking the device
        if self.used > self.slots:
            raise ValueError(f"{self.used} tokens do not fit in {self.slots} slots: reserve more.")
        numbers = torch.arange(self.offset + self.slots, device=self.length.device)
        self.at = self.length[:, None] + numbers[:count]  # positions (B, T)
        self.rope = rope_table(self.model.config.text, self.at)
        slot = (self.at - self.start[:, None])[:, None]  # (B, 1, T)
        first = torch.arange(len(slot) * self.heads, device=slot.device).view(-1, self.heads, 1)
        self.to = (first * self.slots + slot).flatten()  # (B * K * T,), in a list of all
        self.mask = None  # the first tokens are causal among themselves
        if self.offset + self.used > count:
            self.width = self.slots if self.fixed else self.used
            self.mask = numbers[: self.width] <= slot[..., None]  # (B, 1, T, S)
            if self.prompt is not None:
                known = numbers[: self.offset] < self.start[:, None, None, None]
                self.mask = torch.cat([known.expand(-1, -1, count, -1), self.mask], 3)
            if count == 1:  # (B * K, 1, S0 + S), added to scores; -inf could become NaN
                bias = torch.where(self.mask, 0.0, -1e30)
                self.mask = bias.expand(-1, self.heads, -1, -1).flatten(0, 1)

    def attend(self, i, q, k, v):
        """Write k, v (B, K, T, E) of layer i to the next slots. Attention of q (B, H, T, E) to all
        that is there -> (B, T, H * E)."""
        for stored, new in zip(self.kv[i].view(2, -1, k.shape[3]), (k, v)):
            stored.index_copy_(0, self.to, new.reshape(-1, k.shape[3]))
        if self.mask is None:
            return causal_attention(q, k, v, None)
        own, prompt = self.kv[i][:, :, :, : self.width], self.prompt
        if q.shape[2] > 1:
            if prompt is not None:
                own = torch.cat([prompt.kv[i][:, prompt.rows], own], 3)
            return causal_attention(q, *own, self.mask)
        # One token by hand: torch's kernels are slow for so few queries, and a prompt is read once
        # for all its rows: two parts under one softmax (Juravsky et al., arXiv 2402.05099).
        k, v = own.flatten(1, 2)  # (B * K, S, E)
        queries = q.reshape(len(k), -1, q.shape[3])  # (B * K, H / K, E)
        scores = product(queries, k.mT)
        if prompt is not None:
            first = prompt.product(queries, prompt.kv[i][0].mT)
            scores = torch.cat([first, scores], 2)  # (B * K, H / K, S0 + S)
        scores = torch.add(self.mask, scores, alpha=q.shape[3]**-0.5)
        weights = scores.softmax(2).to(q.dtype)
        out = product(weights[..., self.offset :], v)
        if prompt is not None:
            out += prompt.product(weights[..., : self.offset], prompt.kv[i][1])
        return out.to(q.dtype).view(len(q), 1, -1)

    def select(self, rows: Tensor) -> Cache:
        """Keep, drop or repeat rows: one prompt becomes a group of episodes, solved ones leave."""
        if self.prompt is not None:
            GRAPHS.pop(self.model, None)  # or its memory would be held beside what is left
            self.prompt = SharedPrompt(self.prompt.kv, self.prompt.rows[rows])
        elif len(rows.unique()) < len(rows):
            self.prompt, self.start = SharedPrompt(self.kv, rows), self.length
            self.kv = {i: kv[:, :, :, :0] for i, kv in self.kv.items()}
            self.offset, self.slots = self.slots, 0
        for i, kv in self.kv.items():
            self.kv[i] = kv[:, rows]
        self.length, self.start, self.shown = (
            x[rows] for x in (self.length, self.start, self.shown))
        self.image = self.image and self.image.select(rows)
        return self

    def add_images(self, more: ImageContext | None):
        """Further images for the turn that is fed next: an ImageContext of the cache's rows, with
        empty sets for rows that get none, or None."""
        if self.image is None:
            self.image = more and more.with_keys(self.model)
        elif more is not None:
            self.image = self.image.add(more, self.model)

    def keep_latest_image(self):
        """Drop all images but the latest of each row, with their keys and values: no token to come
        sees the others. Not for rows whose latest <|image|> follows directly on another one, which
        tokens see together."""
        self.image = self.image.latest()
        self.shown = self.shown & (self.shown.cumsum(1) == self.shown.sum(1, keepdim=True))

    def visible(self, shown):
        """ImageContext.visible of the next slots; shown (B, T): where <|image|> stands in them."""
        self.shown.scatter_(1, self.at, shown)
        return self.image.visible(self.shown, self.at)

    @contextmanager
    def decoding(self, step, state, temperature):
        """A context with a cheaper `step`, which reads and writes this cache and `state` (tensors),
        all in place: adapters are cast once, and on a GPU it becomes a StepGraph. A model's last
        graph is kept: when everything has the same shape again, its tensors take over what ours
        hold. So a new rollout ends the one before it."""
        linears = linear_layers(self.model).values()
        half = [m for m in linears if m.lora_A and m.lora_A.weight.dtype != m.weight.dtype]
        for linear in half:
            linear.cast = linear.cast_lora(linear.weight.dtype)
        if self.fixed:
            shared = [*filter(None, (self.prompt, self.image))]
            tensors = [*state, self.length, self.start, self.shown, *self.kv.values(),
                       *chain(*(m.cast for m in half), *(part.tensors() for part in shared))]
            key = (temperature, [t.shape for t in tensors],
                   [(part.share, part.even, part.whole) for part in shared],
                   [p.data_ptr() for p in self.model.parameters()],
                   [m.lora_on * m.lora_scale for m in linears])
            graph = GRAPHS.get(self.model)
            if graph is None or graph.key != key:
                kept = [part.kv for part in (self, self.prompt) if part]
                graph = GRAPHS[self.model] = StepGraph(key, tensors, {
                    next(iter(kv.values())).shape: kv for kv in kept})
            for old, new in zip(graph.tensors, tensors):
                new.set_(old.copy_(new))
            step = partial(graph.run, step)
        try:
            yield step
        finally:
            for linear in half:
                linear.cast = None


GRAPHS = weakref.WeakKeyDictionary()  # {model: its last StepGraph}


class StepGraph:
    """A decoding step as a CUDA graph. key: what it was captured for. tensors: all that it reads
    and writes from one call to the next, besides the weights; they stay where they are. kv: those
    of them that hold keys and values, {shape: {layer: tensor}}."""

    def __init__(self, key, tensors, kv):
        self.key, self.tensors, self.kv = key, tensors, kv
        self.graph, self.calls = torch.cuda.CUDAGraph(), 0

    def run(self, step):
        """The first call warms up, the second is captured (which computes nothing) and, like all
        after it, replayed."""
        self.calls += 1
        if self.calls == 1:
            return step()
        if self.calls == 2:
            with torch.cuda.graph(self.graph):
                step()
        self.graph.replay()


# ---- 8. Batches ----------------------------------------------------------------------------------


class Prompts:
    """What rows of a training pass begin with, computed once for all of them: a cache with
    gradients.

    One pass, over the prompts, makes it; a second one, over the rows, has its own with `before` =
    the first and rows (B,) = the prompt of each row. at (B, T): positions of the tokens of this
    pass in their rows, whose ids are given whole. Neither changes afterwards: with gradient
    checkpointing both passes run again, in the order of the backward pass. Prompts are padded on
    the right, which the mask of the second pass has to hide.
    """

    def __init__(self, model, ids, at, image, mask=None, before=None, rows=None):
        c = model.config.text
        self.rope = rope_table(c, at)
        self.at = at
        self.shown = ids == c.vocab_size
        self.image = image
        self.mask, self.before, self.rows = mask, before, rows
        self.stored = {}

    def attend(self, i, q, k, v):
        if self.before is None:
            self.stored.setdefault(i, (k, v))  # not the second time, when the layer runs again
        else:
            k, v = (torch.cat([old.index_select(0, self.rows), new], 2)
                    for old, new in zip(self.before.stored[i], (k, v)))
        return causal_attention(q, k, v, self.mask)

    def visible(self, _):
        return self.image.visible(self.shown, self.at)


def states_before(model, ids, chosen, image):
    """Hidden states (N, D) from which the chosen tokens follow, with log_probs' arguments.

    The values are those of model(ids[:, :-1], image)[chosen[:, 1:]], but a prompt (all before the
    first chosen token) that several rows have, with the same images, is computed once:
        prompts   [ p p p p ]             one row each, padded on the right
        the rest  [ p a a a ] [ p a a ]   from the prompt's last token on, which predicts the first
                                          chosen one; each row sees its prompt and itself
    """
    start = (chosen.int().argmax(1) - 1).clamp(min=0)  # (B,): the last token of each prompt
    sets = [0] * len(ids) if image is None else image.rows.tolist()
    # Sorted, so that the same rows are always summed in the same order.
    prompts = [(tuple(row[:n]), i) for row, n, i in zip(ids.tolist(), start.tolist(), sets)]
    different = sorted(set(prompts))
    rows = [different.index(prompt) for prompt in prompts]  # the number of each row's prompt
    first = [prompts.index(prompt) for prompt in different]  # a row that has it
    if start.sum() - start[first].sum() <= ids.numel() // 16:  # too little is saved
        return model(ids[:, :-1], image)[chosen[:, 1:]]
    row, t = chosen[:, 1:].nonzero(as_tuple=True)
    width, count = (min(rounded(int(most), ids.device), ids.shape[1] - 1)  # of prompts, of the rest
                    for most in (start.max(), (t - start[row]).max() + 1))
    decoder = model.language_model.model
    positions = torch.arange(ids.shape[1], device=ids.device)
    prompts = ids[first, :width]
    image = image and image.with_keys(model)
    shared = Prompts(model, prompts, positions[:width].expand_as(prompts),
                     image and replace(image, rows=image.rows[first]))
    decoder(prompts, None, None, cache=shared)
    at = (start[:, None] + positions[:count]).clamp(max=ids.shape[1] - 2)
    of_prompt = (positions[:width] < start[:, None])[:, None].expand(-1, count, -1)
    causal = torch.ones(len(ids), count, count, dtype=torch.bool, device=ids.device).tril()
    mask = torch.cat([of_prompt, causal], 2)[:, None]
    own = Prompts(model, ids, at, image, mask, shared, torch.tensor(rows, device=ids.device))
    return decoder(ids.gather(1, at), None, None, cache=own)[row, t - start[row]]


def rounded(count: int, device) -> int:
    """A length, rounded up to what the device likes."""
    return count + -count % MULTIPLE.get(torch.device(device).type, 1)


def pad_rows(rows: list[list], pad, device) -> tuple[Tensor, Tensor]:
    """Lists of token ids -> ids (B, T), filled up with `pad` on the right, and lengths (B,)."""
    lengths = [len(row) for row in rows]
    width = rounded(max(lengths), device)
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)


# ---- 9. Vision tower -----------------------------------------------------------------------------


class VisionAttention(nn.Module):
    """Plain multi-head attention, no bias."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x, real):
        """x (I, S, C), the first `real` tokens of each image real: these attend to all, the others
        to them. Two calls without a mask, which would keep torch from its fastest kernel."""
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q[:, :, :real], k, v)
        others = F.scaled_dot_product_attention(q[:, :, real:], k[:, :, :real], v[:, :, :real])
        return self.o_proj(torch.cat([out, others], 2).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc1, exact GELU, fc2, with biases."""

    def __init__(self, c):
        super().__init__()
        self.fc1 = Linear(c.hidden_size, c.intermediate_size, True)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size, True)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer; the global ones have a tanh gate on each branch."""

    def __init__(self, c, gated):
        super().__init__()
        self.self_attn = VisionAttention(c)
        self.mlp = VisionMLP(c)
        self.input_layernorm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        if gated:
            self.gate_attn = nn.Parameter(torch.zeros(1))
            self.gate_ffn = nn.Parameter(torch.zeros(1))
        self.gated = gated

    def forward(self, x, real):
        a = self.self_attn(self.input_layernorm(x), real)
        x = x + (self.gate_attn.tanh() * a if self.gated else a)
        m = self.mlp(self.post_attention_layernorm(x))
        return x + (self.gate_ffn.tanh() * m if self.gated else m)


class Embedding(nn.Embedding):
    """Drawn when made, but not on the meta device: there torch would load its compiler for it."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class TileEmbedding(nn.Module):
    """x (I, M, P, C) + tanh(gate) * what the aspect ratio says of the position of each tile."""

    def __init__(self, c):
        super().__init__()
        self.embedding = Embedding(9, c.max_num_tiles * c.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, ratio_ids):
        table = self.embedding(ratio_ids).view(x.shape[0], x.shape[1], 1, x.shape[3])
        return x + self.gate.tanh() * table


class PositionEmbedding(nn.Module):
    """x (I, M, P, C) + (1 - tanh g) * (of the patch in its tile) + tanh g * (of patch, tile and
    ratio)."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(c.tokens, c.hidden_size))
        self.tile_embedding = Embedding(9, c.max_num_tiles * c.tokens * c.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, ratio_ids):
        g = self.gate.tanh()
        return x + (1 - g) * self.embedding + g * self.tile_embedding(ratio_ids).view(x.shape)


def vision_layers(c, count, gated):
    """A stack of layers under the hub's names."""
    return nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(c, gated) for _ in range(count))})


class VisionTower(nn.Module):
    """Tiles of images -> the final state of every patch with the tapped states of earlier
    layers."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config.vision
        # Layers whose outputs are tapped. Meta names the layers that these states enter.
        self.taps = [i - (config.vision_taps == "input") for i in c.intermediate_layers_indices]
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.gated_positional_embedding = PositionEmbedding(c)
        self.pre_tile_positional_embedding = TileEmbedding(c)
        self.post_tile_positional_embedding = TileEmbedding(c)
        self.layernorm_pre = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.layernorm_post = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.transformer = vision_layers(c, c.num_hidden_layers, gated=False)
        self.global_transformer = vision_layers(c, c.num_global_layers, gated=True)
        self.recompute = False

    def embed(self, tiles, ratio_ids):
        """tiles (I, M, 3, L, L) -> tokens (I, M, P, C) before the first layer."""
        I, M = tiles.shape[:2]
        x = self.patch_embedding(tiles.flatten(0, 1).to(self.class_embedding.dtype)).flatten(2)
        x = self.pre_tile_positional_embedding(x.transpose(1, 2).unflatten(0, (I, M)), ratio_ids)
        x = torch.cat([self.class_embedding.expand(I, M, 1, -1), x], 2)
        return self.layernorm_pre(self.gated_positional_embedding(x, ratio_ids))

    def forward(self, tiles, ratio_ids, tile_mask):
        """tiles (I, M, 3, L, L); ratio_ids (I,) 0 = no image, 1..8; tile_mask (I, M) 1 = real, real
        ones first -> (I, M, P, output_dim). Images with as many real tiles go side by side."""
        count = tile_mask.sum(1)
        groups = {n: (count == n).nonzero()[:, 0] for n in count.unique().tolist()}
        if len(groups) == 1:
            return self.encode(tiles, ratio_ids, *groups)
        parts = [self.encode(tiles[of], ratio_ids[of], n) for n, of in groups.items()]
        return torch.cat(parts)[torch.cat([*groups.values()]).argsort()]

    def encode(self, tiles, ratio_ids, real):
        """The same for images whose first `real` tiles are real.

        Every tile is padded to a multiple of 8 tokens, and only padding to padding is forbidden:
        real tokens do attend to padding and to empty tiles. That is what the checkpoint was trained
        with; "fixing" it changes the features. The order here is all patches, then all padding, so
        that real tokens come first.
        """
        M, P = tiles.shape[1], self.config.tokens
        x = F.pad(self.embed(tiles, ratio_ids).flatten(1, 2), (0, 0, 0, M * (-P % 8)))
        tapped = {-1: x}  # only these: all 40 states of the 11B would be 0.7 GB an image
        for i, layer in enumerate(self.transformer.layers):
            x = run_layer(self, layer, x, real * P)
            if i in self.taps:
                tapped[i] = x
        x = torch.cat([
            self.post_tile_positional_embedding(part.unflatten(1, (M, -1)), ratio_ids).flatten(1, 2)
            for part in self.layernorm_post(x).split(M * P, 1)], 1)
        for layer in self.global_transformer.layers:
            x = run_layer(self, layer, x, real * P)
        # The tap index runs fastest: feature c * taps + j, not blocks of C.
        taps = torch.stack([tapped[i] for i in self.taps], -1).flatten(2)
        return torch.cat([x, taps], -1)[:, : M * P].unflatten(1, (M, P))


# ---- 10. Pictures --------------------------------------------------------------------------------

# Canvases in tiles, id = index + 1. Height first: (width, height) would be silently wrong.
RATIOS = [(rows, cols) for rows in range(1, 5) for cols in range(1, 5) if rows * cols <= 4]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def open_image(source) -> Image.Image:
    """A picture as a person sees it, in 8-bit RGB: upright (EXIF), alpha over white, 16-bit grey
    scaled down. source: a path, bytes or a PIL image. Raises ValueError with one sentence when it
    cannot be read, or when its header announces more than MAX_PIXELS pixels: then none of them is
    decoded."""
    name = str(source)[:200] if isinstance(source, (str, Path)) else "the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            if isinstance(source, (str, Path)) and not os.path.isfile(source):  # a pipe has no end
                raise OSError("there is no such regular file")
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
            if image.width * image.height <= MAX_PIXELS:
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        pass
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise ValueError(f"{name} cannot be read as a picture ({str(error)[:120]}); save it as one "
                         f"of {', '.join(FORMATS)}.") from None
    raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels: scale it down first.")


def _to_rgb(image):
    if image.mode == "F":  # whether white is 1, 255 or 65535 is not in the file
        raise ValueError("its pixels are fractions: save it with 8 bits a channel")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray((grey + 0.5).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def cut_tiles(image, tile):
    """An 8-bit RGB PIL image -> tiles (n, 3, tile, tile) float32, row by row, and the id 1..8 of
    their arrangement.

    The picture goes to the top left of the canvas of `RATIOS` that scales it up least, or else down
    least (the smaller one when several do), shrunk but never enlarged beyond one tile; black fills
    the rest before normalising. Equal to transformers' MllamaImageProcessorPil with the
    checkpoint's settings, to the last bit.
    """
    width, height = image.size
    scales = [min(rows * tile / height, cols * tile / width) for rows, cols in RATIOS]
    best = min((s for s in scales if s >= 1), default=max(scales))
    rows, cols = min((ratio for ratio, s in zip(RATIOS, scales) if s == best), key=math.prod)
    w = min(max(width, tile), cols * tile)
    h = min(max(height, tile), rows * tile)
    if w / width < h / height:
        h = min(max(int(height * (w / width)), 1), h)  # 4000 x 10 has to survive
    else:
        w = min(max(int(width * (h / height)), 1), w)
    canvas = np.zeros((rows * tile, cols * tile, 3), np.uint8)
    canvas[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
    pixels = (canvas * (1 / 255)).astype(np.float32)
    pixels = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    tiles = pixels.reshape(rows, tile, cols, tile, 3).transpose(0, 2, 4, 1, 3)
    tiles = np.ascontiguousarray(tiles.reshape(rows * cols, 3, tile, tile))
    return tiles, RATIOS.index((rows, cols)) + 1


def pack_images(sets: list[list[Image.Image]], tile: int) -> tuple[Tensor, Tensor]:
    """Sets of pictures (lists of what `open_image` returns) -> tiles (R, I, 4, 3, tile, tile)
    float32 and ratio_ids (R, I) long, both 0 where there is none. I: the size of the largest set,
    at least 1."""
    count = max([1, *map(len, sets)])
    tiles = torch.zeros(len(sets), count, 4, 3, tile, tile)
    ratio_ids = torch.zeros(len(sets), count, dtype=torch.long)
    for r, pictures in enumerate(sets):
        for i, picture in enumerate(pictures):
            found, ratio_ids[r, i] = cut_tiles(picture, tile)
            tiles[r, i, : len(found)] = torch.from_numpy(found)
    return tiles, ratio_ids


# ---- 11. Tokenizer and chat ----------------------------------------------------------------------

BOS, EOT, PAD, IMAGE = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"
STOPS = ("<|end_of_text|>", "<|eom_id|>", EOT)
DATE = "26 Jul 2024"  # pinned, or prompts would change every day


class Tokenizer:
    """A `tokenizers` file and the chat format of its model.

    Special tokens are found by name and only ever added as ids: text that spells one is encoded as
    plain text. The tiny tokenizer has one-token headers <|user|> and <|assistant|> and no system
    block; others speak Llama 3.2.
    """

    def __init__(self, bpe):
        self.bpe = bpe
        self.beside = {}  # other files of its model's directory, to be saved with it
        # Reads as: treat special tokens in text like any other text. Never the reverse: a prompt
        # could otherwise end its own turn.
        self.bpe.encode_special_tokens = True
        self.pad, self.eot, self.bos = (self._id(name) for name in (PAD, EOT, BOS))
        self.stop_ids = {bpe.token_to_id(name) for name in STOPS} - {None}
        self.short = bpe.token_to_id("<|user|>") is not None

    def _id(self, name):
        found = self.bpe.token_to_id(name)
        if found is None:
            raise ValueError(f"the tokenizer has no {name} token: it is not of Llama-3.2-Vision.")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens are spelled out, a stop token at the end is left
        off."""
        ids = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self.bpe.decode(ids, skip_special_tokens=False)

    def header(self, role, text=""):
        """Ids that open a message of `role`, with its text: the line break before a text may merge
        with its start."""
        if self.short:
            return [self._id(f"<|{role}|>"), *self.encode(text)]
        start = self._id("<|start_header_id|>")
        end = self._id("<|end_header_id|>")
        return [start, *self.encode(role), end, *self.encode("\n\n" + text)]

    def prompt(self, text: str, image: bool | int = False, system: str = "") -> list[int]:
        """Ids of a conversation that opens with the user's text and waits for the first response.

        image: whether (or how many) pictures precede the text. Raises ValueError for a system
        message beside an image, which the published template refuses too, or for a tokenizer
        without system messages.
        """
        if system and (image or self.short):
            raise ValueError("a system message cannot stand beside an image or in the tiny format: "
                             "put it into the text.")
        ids = [self.bos]
        if not self.short and not image:  # the published template adds this block to text alone
            dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
            ids += self.header("system", dates + system.strip()) + [self.eot]
        return ids + self.turn(text, image)

    def turn(self, text: str, image: bool | int = False) -> list[int]:
        """Ids of one more user message and the header of the response to it; image as in
        `prompt`."""
        if image:
            message = self.header("user") + [self._id(IMAGE)] * int(image) + self.encode(text)
        else:
            message = self.header("user", text)
        return message + [self.eot] + self.header("assistant")


# ---- 12. Saving ----------------------------------------------------------------------------------

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What other tools want beside the weights: taken along from the base to whatever is saved.
KEPT = ("preprocessor_config.json", "processor_config.json", "generation_config.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.json",
        "chat_template.jinja")
# How names begin in memory since transformers 4.52 (PEFT writes these), and on the hub.
LAYOUTS = (("model.language_model.", "language_model.model."),
           ("lm_head.", "language_model.lm_head."), ("model.vision_model.", "vision_model."),
           ("model.multi_modal_projector.", "multi_modal_projector."))


UMASK = os.umask(0)  # to be known it has to be set
os.umask(UMASK)


def write_atomically(path, write):
    """Call write(temporary path) beside `path`, then rename: a reader never meets half a file.

    The temporary folder's name cannot be guessed, so no link can lie in wait there."""
    path = Path(path)
    with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        temporary.chmod(0o666 & ~UMASK)  # safetensors gives the owner alone a right to read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # before the name points to it
        os.replace(temporary, path)


def write_json(path, data):
    """Write data as indented JSON, atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(data, indent=1) + "\n"))


@torch.no_grad()
def save_model(model: LlamaVision, tokenizer: Tokenizer, directory,
               dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9):
    """Write a model directory in the hub's layout: config.json, tokenizer.json and the weights in
    `dtype` (default: as they are) with adapters merged, in one file, or in several of at most
    shard_bytes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    linears = {f"{name}.weight": linear for name, linear in linear_layers(model).items()}
    state = {name: t for name, t in model.state_dict().items() if ".lora_" not in name}
    shards = []
    room = 0
    total = 0
    for name, t in state.items():
        size = t.numel() * (dtype or t.dtype).itemsize
        if size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = t
        room = room - size
        total = total + size
    count = len(shards)
    listed = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        # Merged tensor by tensor: all at once would take the decoder's size again.
        tensors = {name: (merged(linears[name]) if name in linears else t).to("cpu", dtype)
                   for name, t in shard.items()}
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        save = partial(save_file, tensors, metadata={"format": "pt"})
        write_atomically(directory / file, save)
        listed |= dict.fromkeys(shard, file)
    if count > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": listed})
    # What an earlier save left in the other form would be read instead.
    (directory / (INDEX if count == 1 else WEIGHTS)).unlink(missing_ok=True)
    saved = dtype or model.language_model.lm_head.weight.dtype
    config = config_to_json(model.config) | {"torch_dtype": str(saved).removeprefix("torch.")}
    # transformers' default for padding, 128004, is no row of a small model.
    config["text_config"] |= {
        "bos_token_id": tokenizer.bos, "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad}
    write_json(directory / "config.json", config)
    write_atomically(directory / "tokenizer.json", lambda p: tokenizer.bpe.save(str(p)))
    for name, content in tokenizer.beside.items():
        write_atomically(directory / name, lambda p: p.write_bytes(content))


def save_adapter(model: LlamaVision, directory, base):
    """Write the LoRA tensors as PEFT does, with the hub's names, and modules listed in both
    layouts: so PEFT finds them whichever transformers it meets. `base` is the model directory that
    they belong to."""
    directory = Path(directory)
    adapted = {name: linear for name, linear in linear_layers(model).items() if linear.lora_A}
    if not adapted:
        raise ValueError("the model has no adapter to save.")
    directory.mkdir(parents=True, exist_ok=True)
    # PEFT 0.20 and later rename the hub's names of the decoder, but not of tower and projector:
    # those would be dropped with a warning unless they have the names in memory.
    stored = {name if name.startswith(PARTS["decoder"]) else f"model.{name}": linear
              for name, linear in adapted.items()}
    state = {f"base_model.model.{name}.{side}.weight": getattr(linear, side).weight.detach().cpu()
             for name, linear in stored.items() for side in ("lora_A", "lora_B")}
    in_memory = [new + name[len(hub):] for name in adapted for new, hub in LAYOUTS
                 if f"{name}.".startswith(hub)]
    first = next(iter(adapted.values()))
    rank = first.lora_A.out_features
    write_atomically(directory / ADAPTER, lambda p: save_file(state, p, metadata={"format": "pt"}))
    write_json(directory / ADAPTER_CONFIG, {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "bias": "none",
        "task_type": None, "auto_mapping": {  # CAUSAL_LM would open the decoder without its eyes
            "base_model_class": "MllamaForConditionalGeneration",
            "parent_library": "transformers.models.mllama.modeling_mllama"},
        "lora_alpha": first.lora_scale * rank, "target_modules": [*adapted, *in_memory]})


# ---- 13. Loading ---------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Entries of PEFT's LoRA that are read here or change no output; others are refused when they are
# set. So are ways to begin that take the adapter's first value out of the base, such as "pissa".
READ = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "task_type", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"}
STARTS = (True, None, False, "gaussian", "orthogonal", "eva", "mica")
# What trainers leave beside an adapter; other weights there were trained and would be lost.
BESIDE = re.compile(r"(adapter_model|training_args|optimizer|scheduler|scaler|state|rng_.*)\..*")
CACHED = re.compile(r".*/models--[^/]+/blobs/[0-9a-f]{40,64}")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class Stored(NamedTuple):
    """A tensor in a safetensors file, under the name that it has there."""

    dtype: torch.dtype
    shape: tuple
    name: str


class Adapter(NamedTuple):
    """A LoRA adapter in PEFT's format."""

    rank: int
    alpha: float
    modules: tuple  # ends of the names of adapted modules; empty: only the tensors tell
    base: Path  # directory of the model that it changes
    files: dict  # of find_weights


def load_model(directory, dtype: torch.dtype = torch.float32,
               device="cpu") -> tuple[LlamaVision, Tokenizer]:
    """(model, tokenizer) of a directory in the hub's layout, or of an adapter in PEFT's: then of
    its base with the adapter beside it, ready to be trained on.

    Weights come in `dtype`, whatever they are stored in; an adapter stays float32. All names,
    shapes and sizes are checked before memory is taken. Raises ValueError with one sentence for
    whatever is wrong.
    """
    base = Path(directory)
    adapters = []
    while os.path.exists(base / ADAPTER_CONFIG):
        adapters.insert(0, read_adapter(base))
        base = adapters[0].base
        if len(adapters) > 8:
            raise ValueError(f"{directory} is an adapter of an adapter, and so on for ever; "
                             "name a base that is a model.")
    if not os.path.exists(base / "config.json"):
        raise ValueError(f"{base} holds no model: it has no config.json; "
                         f"{remedy(base, 'config.json')}.")
    config = config_from_json(read_json(_file(base, "config.json")))
    tokenizer = load_tokenizer(base)
    if max(tokenizer.bpe.get_vocab().values()) >= config.text.vocab_size + 8:
        raise ValueError(f"{base / 'tokenizer.json'} has more tokens than the embedding has rows; "
                         "take this model's.")
    with torch.device("meta"):
        model = LlamaVision(config).to(dtype)
    files = find_weights(base)
    _check_tensors(files, model.state_dict())
    for adapter in adapters:
        attach(model, adapter)  # on a model without data: the adapter is checked
    merge_lora(model)
    try:
        # Not model.to_empty, for which torch would load sympy: half a second.
        model.load_state_dict({name: torch.empty(t.shape, dtype=t.dtype, device=device)
                               for name, t in model.state_dict().items()}, assign=True)
    except RuntimeError:
        size = sum(p.nbytes for p in model.parameters()) / 1e9
        raise ValueError(f"{device} has no room for {base}: {size:.1f} GB as {str(dtype)[6:]}."
                         ) from None
    for path, header in files.items():
        read_tensors(path, header, model.state_dict())
    for adapter in adapters:
        attach(model, adapter)
        for path, header in adapter.files.items():
            read_tensors(path, header, model.state_dict())
    return model, tokenizer


def attach(model, adapter):
    """Add the layers of an Adapter, whose tensors must fit. PEFT adapts every module whose name
    ends with a listed one; where none are listed, the tensors tell."""
    merge_lora(model)  # an adapter that was trained on top of another counts that as its base
    model.requires_grad_(False)
    stored = {name.rpartition(".lora_")[0] for header in adapter.files.values() for name in header}
    ends = tuple(f".{module}" for module in adapter.modules)
    for name, linear in linear_layers(model).items():
        if name in stored or f".{name}".endswith(ends):
            linear.add_lora(adapter.rank, adapter.alpha)
    _check_tensors(adapter.files, {n: t for n, t in model.state_dict().items() if ".lora_" in n})


def read_start(run) -> dict:
    """The start.json of a training run, which says where it began from; {} without one."""
    path = Path(run) / "start.json"
    start = read_json(path) if path.is_file() else {}
    if not isinstance(start, dict):
        raise ValueError(f"{path} is not that of a training run; remove it.")
    return start


def read_adapter(directory):
    """The Adapter of a directory."""
    path = _file(directory, ADAPTER_CONFIG)
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe a LoRA adapter (peft_type must be \"LORA\").")
    unknown = [name for name in config if name not in READ and config[name] not in (None, "none")]
    started = [] if config.get("init_lora_weights") in STARTS else ["init_lora_weights"]
    for name in [*filter(config.get, unknown), *started]:
        raise ValueError(f"{path} asks for {name} = {str(config[name])[:40]}, which is not built "
                         "here; merge it with PEFT and load the result.")
    rank = _number(f"{path}: r", config.get("r"), int)
    alpha = _number(f"{path}: lora_alpha", config.get("lora_alpha"), float)
    alpha *= rank**0.5 if config.get("use_rslora") is True else 1
    modules = config.get("target_modules")
    base = config.get("base_model_name_or_path")
    if not isinstance(modules, (str, list)) or not all(isinstance(m, str) for m in modules):
        raise ValueError(f"{path}: target_modules must be a text or a list of module names.")
    # A text is a pattern, which is never run: it could take for ever.
    narrowed = config.get("layers_to_transform") or config.get("exclude_modules")
    modules = () if narrowed or isinstance(modules, str) else map(hub_name, modules)
    paths = [Path(base), directory / base] if isinstance(base, str) and base else []
    if start := read_start(directory.parent):  # of a run that was moved together with its base
        paths.append(directory.parent / str(start.get("from_here")))
    found = next(filter(os.path.isdir, paths), None)
    if found is None:
        raise ValueError(f"{path}: base_model_name_or_path must name the directory of the base "
                         f"model, which {str(base)[:80]!r} is not (looked for at "
                         f"{', '.join(repr(str(place)[-80:]) for place in paths)}); "
                         "download it, and put its path there.")
    for file in sorted(os.listdir(directory)):
        if file.endswith(WEIGHT_FILES) and not BESIDE.fullmatch(file):
            raise ValueError(f"{directory / file} lies beside an adapter and would not be read: "
                             "merge all that was trained with the code that wrote it, and load "
                             "the result; or move it away, and the adapter alone is loaded.")
    files = find_weights(directory, ADAPTER)
    if not any(files.values()):
        raise ValueError(f"{directory / ADAPTER} holds no tensor: it was saved without its weights "
                         "(such as by a trainer with ZeRO-3); save it again.")
    return Adapter(rank, alpha, tuple(modules), found, files)


# ---- 14. Files of others -------------------------------------------------------------------------


def remedies(kind):
    """[(pattern, what to do)] for what other tools leave: "folders", by a file that they hold, or
    "tensors", by a part of their names."""
    return read_json(Path(__file__).parent / "assets" / "remedies.json")[kind].items()


def remedy(directory: Path, name: str) -> str:
    """What to do about a folder that lacks a file of this name, by what it holds instead."""
    found = (advice for pattern, advice in remedies("folders") if pattern == f"no {name}"
             or os.path.isdir(directory) and any(Path(directory).glob(pattern)))
    return next(found, "copy or download the directory again")


def hub_name(name):
    """The hub's name of a tensor or module in either layout, of an adapter's too."""
    name = name.removeprefix("base_model.model.")
    return next((hub + name[len(new):] for new, hub in LAYOUTS if name.startswith(new)), name)


def find_weights(directory, file=WEIGHTS):
    """{path: {hub's name: Stored}} of a model's or an adapter's directory: one file, or the shards
    that its index lists. Raises ValueError also for a tensor that is there twice."""
    listed = {}
    files = {}
    seen = {}
    if not os.path.exists(directory / file) and os.path.exists(directory / INDEX):
        index = read_json(_file(directory, INDEX))
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{directory / INDEX} has no weight_map of tensors to files; "
                             "copy or download it again.")
    for path in dict.fromkeys(_file(directory, shard) for shard in listed.values() or [file]):
        files[path] = {}
        for name, stored in read_header(path).items():
            hub = hub_name(name)
            if seen.setdefault(hub, stored) is not stored:
                raise ValueError(f"{path} has tensor {name[:120]!r} twice, or another file has it "
                                 "too; keep one of the two.")
            files[path][hub] = stored
    there = {stored.name for stored in seen.values()}
    for name in sorted(listed.keys() ^ there) if listed else ():
        raise ValueError(f"{directory} {'lacks' if name in listed else 'has an unlisted'} tensor "
                         f"{name[:120]!r}, unlike {INDEX}; copy or download both again.")
    return files


def read_header(path):
    """{name: Stored} of a safetensors file; no tensor is read. The library checks that the tensors
    fill the file without gaps. Raises ValueError with one sentence."""
    found = {}
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                kind = part.get_dtype()
                found[name] = Stored(DTYPES.get(kind, kind), tuple(part.get_shape()), name)
    except (OSError, SafetensorError) as error:
        with open(path, "rb") as file:
            pointer = b"git-lfs" in file.read(100)
        advice = "it is a pointer: run git lfs pull" if pointer else "copy or download it again"
        raise ValueError(f"{path} cannot be read as a safetensors file ({str(error)[:200]!r}); "
                         f"{advice}.") from None
    for name, stored in found.items():
        if isinstance(stored.dtype, str):
            raise ValueError(f"{path}: tensor {name[:120]!r} is of type {stored.dtype!r}, not "
                             f"{', '.join(DTYPES)}: take the model from before it was quantized.")
    return found


@torch.no_grad()
def read_tensors(path, header, targets):
    """Fill targets[name] (of any float type, on any device) from a file with this header. The
    library maps the file: until it is closed its pages count beside the weights, but the system may
    drop them. A GPU copies faster from memory that stays where it is; torch keeps that for the next
    tensor."""
    with safe_open(path, "pt") as file:
        for name, stored in header.items():
            tensor, target = file.get_tensor(stored.name), targets[name]
            target.copy_(tensor.pin_memory() if target.is_cuda else tensor)


def _check_tensors(files, wanted):
    """Compare names and shapes in {path: header} with {name: tensor}."""
    found = {name: (path, stored.shape) for path, header in files.items()
             for name, stored in header.items()}
    for name in sorted(found.keys() - wanted.keys()):
        advice = next((advice for part, advice in remedies("tensors") if part in name),
                      "it belongs to another model")
        raise ValueError(f"{found[name][0]} has an unknown tensor {name[:120]!r}; {advice}.")
    for name, tensor in wanted.items():
        path, shape = found.get(name, (min(files).parent, None))
        if shape is None:
            raise ValueError(f"{path} lacks tensor {name!r} of its configuration; "
                             "copy or download it again.")
        if shape == (0,):
            raise ValueError(f"{path}: tensor {name} is empty, as ZeRO-3 leaves it: gather the "
                             "weights with DeepSpeed's zero_to_fp32.py.")
        if shape != tensor.shape:
            table = "embed_tokens" in name or "lm_head" in name
            resized = table and shape[1:] == tensor.shape[1:]
            advice = ("its vocabulary was resized: take the model from before" if resized
                      else "take both from the same model")
            raise ValueError(f"{path}: tensor {name} has shape {shape}, but the configuration asks "
                             f"for {tuple(tensor.shape)}; {advice}.")


def load_tokenizer(directory) -> Tokenizer:
    """The Tokenizer of a model directory."""
    path = _file(Path(directory), "tokenizer.json")
    try:
        if path.stat().st_size > 100_000_000:
            raise ValueError("it is over 100 MB")
        bpe = BPE.from_file(str(path))
        bpe.no_truncation()  # both are kept in the file, and would cut or fill every text
        bpe.no_padding()
        tokenizer = Tokenizer(bpe)
        tokenizer.turn("", image=True)  # asks for all special tokens of the chat format
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics at some files
        raise ValueError(f"{path} cannot be used as a tokenizer ({str(error)[:120]}); "
                         "copy it again.") from None
    for name in filter(os.listdir(directory).__contains__, KEPT):
        with open(_file(Path(directory), name), "rb") as file:
            tokenizer.beside[name] = file.read(1_000_000)
    return tokenizer


def read_json(path):
    """A JSON file of at most 1 MB, or a ValueError that names it."""
    def once(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("an entry is there twice")
        return dict(pairs)
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would never end
            raise ValueError("it is no regular file")
        if os.path.getsize(path) > 1_000_000:
            raise ValueError("it is over 1 MB")
        return json.loads(Path(path).read_text("utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or is not JSON ({str(error)[:120]}); "
                         "copy or download it again.") from None


def _file(directory, name):
    """Path of a regular file in a directory. A link may leave it only for the hub's cache, as a
    snapshot or an older client's --local-dir does: what lies there came from the hub. An index or
    an archive from elsewhere must not make us read other files."""
    plain = isinstance(name, str) and 0 < len(name) < 200 and not set(name) & set("/\\\0")
    if not plain or name in (".", ".."):
        shown = repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
        raise ValueError(f"{directory}: the index names {shown} as a shard; "
                         "it must name plain files of this directory.")
    path = directory / name
    home = os.path.realpath(directory)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing or no regular file; {remedy(directory, name)}.")
    real = os.path.realpath(path)
    if os.path.dirname(real) != home and not CACHED.fullmatch(real):
        raise ValueError(f"{path} is a link out of its directory; put the file itself there.")
    return path


# ---- 15. Cost ------------------------------------------------------------------------------------


def count_parameters(model: LlamaVision) -> dict[str, int]:
    """Parameters of the decoder, the tower (with projector), the adapters, and those that are
    trained."""
    counts = dict.fromkeys(("decoder", "vision", "adapters", "trained"), 0)
    for name, p in model.named_parameters():
        part = "decoder" if name.startswith("language_model") else "vision"
        counts["adapters" if ".lora_" in name else part] += p.numel()
        counts["trained"] += p.numel() * p.requires_grad
    return counts


class Work(NamedTuple):
    """What a pass computes, summed over its rows and images. Padding is not counted."""

    tokens: int = 0  # of text; through the cross layers too where there is an image
    pairs: int = 0  # a token and one that it attends to: itself or one before it
    scored: int = 0  # positions whose logits are needed
    images: int = 0  # whose keys and values the cross layers compute
    encoded: int = 0  # images that go through tower and projector


def text_work(start: int, end: int, scored: int) -> Work:
    """Tokens start .. end - 1 of one sequence whose first `start` are cached."""
    pairs = (end * (end + 1) - start * (start + 1)) // 2
    return Work(end - start, pairs, scored)


def add_work(parts: list[Work]) -> Work:
    """The sum of the parts."""
    return Work(*map(sum, zip(*parts)))


def image_tokens(config: Config) -> int:
    """Tokens that one image takes in cross attention: all of its tile slots, empty ones too."""
    return config.vision.max_num_tiles * config.vision.tokens


def pass_flops(model: LlamaVision, work: Work, backward=False, adapters=True) -> int:
    """FLOPs of a pass over `work`: forward, and with `backward` the gradients of what is trained.
    adapters: whether they are on.

    A weight costs 2 a token forward; backward 2 for the gradient of the layer's input, if anything
    before it is trained, and 2 for its own, if it is trained. So 6 in full fine-tuning, 4 in what
    LoRA freezes, 2 in a frozen tower. Attention costs 4 per head, head size, query and key, and
    twice that backward. A query of text has the keys up to itself, in a cross layer those of one
    image, a query of the tower all slots. Recompute runs a layer again up to its last product,
    which backward does not need. Norms and lookups are free.
    """
    c, v, decoder = model.config.text, model.config.vision, model.language_model.model
    tower, last_part = model.vision_model, model.language_model.lm_head
    image, slots = image_tokens(model.config), v.max_num_tiles * (v.tokens + -v.tokens % 8)
    encoded, queries = work.encoded * slots, c.num_attention_heads * c.head_dim
    looking = work.tokens * bool(work.images)
    sizes = {  # of a part: its tokens, and channels x queries x keys of its attention
        VisionLayer: (encoded, v.hidden_size * encoded * slots),
        SelfLayer: (work.tokens, queries * work.pairs),
        CrossLayer: (looking, queries * looking * image)}
    flops, below = 0, False  # below: is anything before this part trained?
    for part in (tower.patch_embedding, *tower.transformer.layers, *tower.global_transformer.layers,
                 model.multi_modal_projector, decoder.embed_tokens, *decoder.layers, last_part):
        others = work.scored if part is last_part else work.encoded * image
        tokens, products = sizes.get(type(part), (others, 0))
        below = below and part is not decoder.embed_tokens  # text does not come out of the tower
        looks = isinstance(part, CrossLayer) and model.trains_vision
        inside = below or looks or any(p.requires_grad for p in part.parameters())
        again = inside and decoder.recompute and type(part) in sizes
        flops += 4 * products * (1 + backward * (2 * inside + again))
        linears = [(name, m) for name, m in part.named_modules()
                   if isinstance(m, (nn.Linear, nn.Conv2d)) and (adapters or "lora" not in name)]
        for name, linear in linears:
            keys = name.startswith(("cross_attn.k", "cross_attn.v"))
            deep = "o_proj" in name or "mlp" in name or "lora_B" in name
            before = inside if deep else looks if keys else below
            passes = before + linear.weight.requires_grad + (again and linear is not linears[-1][1])
            rows = work.images * image if keys else tokens
            flops += 2 * rows * linear.weight.numel() * (1 + backward * passes)
        below = inside
    return flops

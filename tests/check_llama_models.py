"""model.py against Meta's own package: logits, gradients, answers, pictures, token ids. By hand, not in `make test`:

    python3 -m venv /tmp/oracle-meta && /tmp/oracle-meta/bin/pip install torch==2.13.0 torchvision==0.28.0 llama-models==0.3.0 \
        fairscale==0.4.13 tokenizers==0.23.3 safetensors==0.8.0 pillow==13.0.0 numpy==2.4.6
    /tmp/oracle-meta/bin/python tests/check_llama_models.py

Compared with llama-models 0.3.0, under Python 3.11 with tiktoken 0.14.0 and the versions above, on a CPU:
  model      llama3/multimodal/model.py, its code as published, in a model-parallel group of this one process. Sizes of the 11B that
             are written into it become small (VisionEncoder is called with others), the "llama3" constants of RoPE are met by scaling
             the frequencies. In "published" the cross layers stand as in the 11B; in the other cases, those of make_fixtures.py, they
             also stand next to each other and last, and Meta's blocks are called in that order.
  fixtures   tests/fixtures/*-meta.npz, which patched transformers made, against the same.
  pictures   llama3/multimodal/image_transform.py.
  token ids  llama3/tokenizer.py and chat_format.py with the package's tokenizer.model, of which our tokenizer.json is made.
Rows "known" are differences that stay; they fail when they are gone.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_fixtures as fx  # noqa: E402
import model as M  # noqa: E402

try:
    import torchvision  # noqa: F401
except RuntimeError:  # beside a torch for CPUs the index's torchvision, made for CUDA, lacks operators that nothing here uses
    for loaded in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[loaded]
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import fairscale.nn.model_parallel.initialize as parallel  # noqa: E402
from llama_models import datatypes  # noqa: E402
from llama_models.llama3 import args as sizes  # noqa: E402
from llama_models.llama3 import chat_format, tokenizer  # noqa: E402
from llama_models.llama3 import model as text_only  # noqa: E402
from llama_models.llama3.multimodal import image_transform  # noqa: E402
from llama_models.llama3.multimodal import model as meta  # noqa: E402

GOOD = []
# Meta's own arrangement: a cross layer before the second and the fourth of four decoder layers; on the hub all six are counted
PUBLISHED = M.Config(M.TextConfig(fx.VOCAB, 32, 48, 6, 4, 2, (1, 4)), M.VisionConfig(24, 2, 40, 5, 2, 4, 12, 4, (1, 2, 4)))


def report(what, error, limit=1e-5):
    GOOD.append(error <= limit)
    print(f"{'ok   ' if GOOD[-1] else 'BAD  '} {error:7.1e}  {what}", flush=True)


def known(what, differs):
    GOOD.append(bool(differs))
    print(f"{'known' if differs else 'BAD  '}          {what}", flush=True)


def distance(ours, theirs):
    """Largest difference, relative to the root mean square of theirs."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.square().mean().sqrt().clamp(min=1e-12)).item()


# ---------------------------------------------------------------- Meta's model at our sizes


def spread(layers, crosses):
    """Decoder layers, counted alone, that Meta puts a cross layer before."""
    class Noted:
        n_llama_layers = layers
    return meta.CrossAttentionTransformerText._init_fusion_schedule(Noted, crosses)


def their_model(config, length):
    """Meta's CrossAttentionTransformer of the sizes of `config`, for texts of at most `length` tokens."""
    c, v, Encoder, scaling = config.text, config.vision, meta.VisionEncoder, text_only.apply_scaling
    count, stretch = len(c.cross_attention_layers), c.rope_original / 8192
    args = sizes.ModelArgs(
        dim=c.hidden_size, n_layers=c.num_hidden_layers - count, n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads,
        vocab_size=c.vocab_size, multiple_of=c.intermediate_size, ffn_dim_multiplier=0.1, norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta, use_scaled_rope=c.rope_factor != 1, max_seq_len=length, vision_chunk_size=v.image_size,
        vision_num_cross_attention_layers=count)
    meta.VisionEncoder = lambda **of_11b: Encoder(
        max_num_tiles=4, image_size=v.image_size, patch_size=v.patch_size, width=v.hidden_size, layers=v.num_hidden_layers,
        heads=v.attention_heads, mlp_ratio=v.intermediate_size / v.hidden_size, n_global_layers=v.num_global_layers,
        global_model=True, return_intermediate=list(v.intermediate_layers_indices))
    text_only.apply_scaling = lambda frequencies: scaling(frequencies * stretch) / stretch
    model = meta.CrossAttentionTransformer(args)
    meta.VisionEncoder, text_only.apply_scaling = Encoder, scaling
    model.vision_model.vision_projection = meta.ColumnParallelLinear(v.output_dim, c.hidden_size, bias=True, init_method=lambda x: x)
    model.vision_model.patch_size = v.patch_size
    if config is not PUBLISHED:
        arrange(model.text_model, c)
    model.text_model.setup_cache(8, torch.device("cpu"), torch.float32)
    return model


def arrange(text, c):
    """Call Meta's blocks in the order of the hub's layers: dummies of Meta's stand where it pairs none."""
    blocks = [meta.CrossAttentionTransformerBlock(text.args, j) for j in range(len(c.cross_attention_layers))]
    text.cross_attention_layers = torch.nn.ModuleList(blocks)
    selves, crosses, order = iter(text.layers), iter(blocks), []
    none_before, none_behind = meta.DummyCrossAttentionTransformerBlock(), meta.DummySelfAttentionTransformerBlock()
    for i in range(c.num_hidden_layers):
        if i in c.cross_attention_layers:
            order.append((none_behind, next(crosses), c.cross_attention_layers.index(i)))
        else:
            order.append((next(selves), none_before, 0))
    text.text_and_xattn_layers = order


def interleaved(weight, heads):
    """RoPE: the hub has real and imaginary parts as halves of a head, Meta in turns."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def table(rows, total):
    """Meta's (4, 4, N, C) of the hub's (9, 4 * N * C); of gradients the sum (total), of weights any, as corners agree."""
    out = torch.zeros(4, 4, rows.shape[1] // 4)
    for (r, c), row in zip(M.RATIOS, rows[1:]):
        corner = row.view(4, -1)[: r * c].view(r, c, -1)
        out[:r, :c] = out[:r, :c] + corner if total else corner
    return out


LAYER = {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
         "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "cross_attn.q_norm": "attention.q_norm",
         "cross_attn.k_norm": "attention.k_norm", "cross_attn_attn_gate": "gate_attn", "cross_attn_mlp_gate": "gate_ffwd"}
LAYER |= {f"{kind}_attn.{x}_proj": f"attention.w{x}" for kind in ("self", "cross") for x in "qkvo"}
BLOCK = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
         "layers": "resblocks"} | {f"self_attn.{x}_proj": f"attn.w{x}" for x in "qkvo"}
OUTER = {"patch_embedding": "conv1._linear", "gated_positional_embedding.gate": "gated_positional_embedding_gate",
         "gated_positional_embedding.embedding": "positional_embedding", "gated_positional_embedding.tile_embedding.weight":
         "gated_positional_embedding", "layernorm_pre": "ln_pre", "layernorm_post": "ln_post"}
OUTER |= {f"{x}_tile_positional_embedding.{ours}": f"{x}_tile_pos_embed.{theirs}" for x in ("pre", "post")
          for ours, theirs in (("gate", "gate"), ("embedding.weight", "embedding"))}
WHOLE = {"language_model.lm_head": "text_model.output", "language_model.model.norm": "text_model.norm",
         "multi_modal_projector": "vision_model.vision_projection"}


def renamed(name, names):
    """The name with each part of `names` that it holds replaced; parts end at dots."""
    for ours, theirs in names.items():
        name = f".{name}.".replace(f".{ours}.", f".{theirs}.").strip(".")
    return name


def their_tensors(state, c, total=False):
    """Meta's {name: tensor} of the hub's; total: they are gradients."""
    out, cross = {}, c.cross_attention_layers
    selves = [i for i in range(c.num_hidden_layers) if i not in cross]
    for name, tensor in state.items():
        if ".layers." in name and name.startswith("language_model"):
            i, rest = name.removeprefix("language_model.model.layers.").split(".", 1)
            place = f"cross_attention_layers.{cross.index(int(i))}" if int(i) in cross else f"layers.{selves.index(int(i))}"
            for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
                tensor = interleaved(tensor, heads) if f"self_attn.{part}" in rest else tensor
            out[f"text_model.{place}.{renamed(rest, LAYER)}"] = tensor
        elif "embed_tokens" in name:
            out["text_model.tok_embeddings.weight"], out["text_model.learnable_embedding.weight"] = tensor.split([c.vocab_size, 8])
        elif name.startswith("vision_model"):
            inner = name.removeprefix("vision_model.")
            theirs = renamed(inner, BLOCK if "transformer" in inner else OUTER)
            width = state["vision_model.class_embedding"].shape[0]
            if tensor.dim() == 2 and tensor.shape[0] == 9 and "embedding" in inner:
                tensor = table(tensor, total).unflatten(2, (-1, width))
            out[f"vision_model.vision_encoder.{theirs}"] = tensor.flatten(1) if tensor.dim() == 4 and "conv1" in theirs else tensor
        else:
            out[renamed(name, WHOLE)] = tensor
    return out


def load(model, state, config):
    """Our weights in Meta's model. strict: each of its parameters has one of ours, and the other way round."""
    theirs = their_tensors(state, config.text)
    assert theirs.keys() == dict(model.named_parameters()).keys(), theirs.keys() ^ dict(model.named_parameters()).keys()
    model.load_state_dict(theirs, strict=True)


def seeing(model, rows, tiles, ratio_ids, total):
    """What Meta's compute_vision_tokens_masks computes, of tiles instead of pictures: features, states and the arguments of forward.
    rows: lists of ids; total: the length that masks are made for."""
    B, I = ratio_ids.shape
    ratios = torch.tensor([[M.RATIOS[i - 1] if i else (1, 1) for i in row] for row in ratio_ids.tolist()])
    seen = {}
    hook = model.vision_model.vision_encoder.register_forward_hook(lambda module, given, out: seen.update(features=out))
    tokens = model.vision_model(tiles, ratios)
    hook.remove()
    caches = torch.stack([layer.compute_xattn_kv_cache(tokens.view(B, -1, tokens.shape[-1]))
                          for layer in model.text_model.cross_attention_layers])
    masks = [chat_format.create_vision_mask(row, fx.IMAGE) for row in rows]
    counts = [[int(np.prod(M.RATIOS[i - 1])) for i in row if i] for row in ratio_ids.tolist()]
    masks = meta._pad_masks([mask + [[0, 0]] * (I - len(mask)) for mask in masks], counts, total, 4)
    mask, full = model.text_model._get_xattn_mask(total, "cpu", torch.float32, tokens, masks)
    return seen["features"], tokens, {"xattn_caches": caches, "cross_attention_masks": mask, "full_text_row_masked_out_mask": full}


def fresh_cache(model):
    """Forget keys and values, with the graph that they hang in."""
    model.text_model.setup_cache(8, torch.device("cpu"), torch.float32)


def compare(name, config, seed):
    """One case: our model, and the fixture if there is one, against Meta's."""
    ids, lengths, chosen, tiles, ratio_ids = fx.batch(name)
    rows = [row[:n].tolist() for row, n in zip(ids, lengths)]
    with torch.device("meta"):
        ours = M.LlamaVision(config)
    state = fx.random_weights({k: tuple(v.shape) for k, v in ours.state_dict().items()}, seed)
    ours.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True, assign=True)
    ours.requires_grad_()
    theirs, T = their_model(config, ids.shape[1] + 8), ids.shape[1]
    load(theirs, state, config)
    real, exists = torch.arange(T) < lengths[:, None], ratio_ids > 0

    features, states, given = seeing(theirs, rows, tiles, ratio_ids, T)
    logits = theirs(torch.arange(T), ids, **given)
    loss = F.cross_entropy(logits[:, :-1][chosen[:, 1:]], ids[:, 1:][chosen[:, 1:]])
    loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    want = {"features": features[exists], "states": states[exists], "logits": logits[real], "loss": loss.detach()}

    context = ours.encode_images(tiles, ratio_ids)
    our_loss = -ours.log_probs(ids, chosen, image=context).mean()
    our_loss.backward()
    found = {"states": context.features.view_as(states)[exists], "logits": ours.logits(ours(ids, context))[real], "loss": our_loss}
    for what, value in found.items():
        report(f"{name}: our {what}", distance(value, want[what]))
    found = their_tensors({n: p.grad for n, p in ours.named_parameters()}, config.text, True)
    report(f"{name}: our gradients of {len(found)} tensors", max(distance(g, gradients[n]) for n, g in found.items()), 1e-4)

    for b, row in enumerate(rows):  # alone, without padding
        images = ours.encode_images(tiles[[b]], ratio_ids[[b]])
        got, exact = ours.logits(ours(torch.tensor([row]), images))[0], logits[b, : len(row)]
        report(f"{name}: our logits, row {b} alone ({sum(t == fx.IMAGE for t in row)} pictures)", distance(got, exact))
    cache = M.Cache(ours, len(rows), T + 8, context)
    with torch.no_grad():
        first = ours.extend(cache, ids, lengths)
    said, _ = M.generate(ours, cache, first, M.Sampling(8, temperature=0), {-1})
    answers = [greedy(theirs, row, tiles[[b]], ratio_ids[[b]]) for b, row in enumerate(rows)]
    report(f"{name}: our greedy answers, tokens that differ", sum(x != y for a, b in zip(said, answers) for x, y in zip(a, b)), 0)

    if config is not PUBLISHED:
        with np.load(fx.FIXTURES / f"{name}-meta.npz") as data:
            fixture = {k: torch.from_numpy(data[k]) for k in data.files}
        kept = {"features": fixture["features"][exists], "states": fixture["states"][exists].view_as(want["states"]), "logits": fixture["logits"][real],
                "loss": fixture["loss"]}
        for what, value in kept.items():
            report(f"{name}: the fixture's {what}", distance(value, want[what]))
        found = their_tensors({k.removeprefix("grad "): v for k, v in fixture.items() if k.startswith("grad ")}, config.text, True)
        report(f"{name}: the fixture's gradients", max(distance(g, gradients[n]) for n, g in found.items()), 1e-4)
        report(f"{name}: the fixture's greedy answers, tokens that differ", int((fixture["greedy"] != torch.tensor(answers)).sum()), 0)


@torch.no_grad()
def greedy(model, row, tiles, ratio_ids, count=8):
    """Meta's likeliest continuation of a row, token by token through its cache. The masks are those of the text so far: made from the
    prompt alone, as its generation does, they would hide all pictures from an answer when there are several (findings/)."""
    out, done = list(row), 0
    fresh_cache(model)
    while len(out) < len(row) + count:
        pictures = bool(ratio_ids.any())
        given = seeing(model, [out], tiles, ratio_ids, len(out))[2] if pictures else {}
        empty = dict.fromkeys(("cross_attention_masks", "full_text_row_masked_out_mask"), torch.zeros(1, 1, len(out), 1))
        given = given or empty | {"xattn_caches": torch.zeros(len(model.text_model.cross_attention_layers)), "text_only_inference": True}
        logits = model(torch.arange(done, len(out)), torch.tensor([out]), **given)
        done = len(out)
        out.append(int(logits[0, -1].argmax()))
    return out[len(row):]


@torch.no_grad()
def from_pictures(config):
    """Meta's whole way from pictures and token ids to logits, by its own functions alone, against ours."""
    theirs = their_model(config, 16)
    with torch.device("meta"):
        ours = M.LlamaVision(config)
    state = fx.random_weights({k: tuple(v.shape) for k, v in ours.state_dict().items()}, 5)
    ours.load_state_dict(state, strict=True, assign=True)
    load(theirs, state, config)
    sets = [[(30, 9)], [(5, 40), (12, 12)], [], [(25, 25)]]
    sets = [[Image.fromarray(fx.picture(*size)) for size in row] for row in sets]
    rows = [[3, fx.IMAGE, 5, 6, 7, 8, 9, 4], [3, fx.IMAGE, 5, fx.IMAGE, 7, 8, 2, 2], [3, 4, 5, 6, 7, 8, 9, 1], [fx.IMAGE, 4, 5, 6, 7, 8, 1, 1]]
    masks = [chat_format.create_vision_mask(row, fx.IMAGE) for row in rows]
    caches, mask, full = theirs.compute_vision_tokens_masks(sets, masks, 8, torch.device("cpu"))
    want = theirs(torch.arange(8), torch.tensor(rows), mask, full, caches)
    opened = [[M.open_image(picture) for picture in row] for row in sets]
    context = ours.encode_images(*M.pack_images(opened, config.vision.image_size))
    report("published: from pictures to logits", distance(ours.logits(ours(torch.tensor(rows), context)), want))


# ---------------------------------------------------------------- pictures


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def pictures():
    """Tiles and arrangement of pictures, to the last bit."""
    different, compared = [], [size for size in fx.SIZES if size[2] != 28] + fx.SIZES[-144::2]
    for width, height, tile in compared:
        ours, ratio_id = M.cut_tiles(M.open_image(png(fx.picture(width, height))), tile)
        theirs, ratio = image_transform.VariableSizeImageTransform(tile)(Image.fromarray(fx.picture(width, height)), 4)
        if M.RATIOS[ratio_id - 1] != ratio or ours.tobytes() != theirs.numpy().tobytes():
            different.append((width, height, tile))
    report(f"pictures: {len(compared)} sizes, tiles that differ in a bit {different[:3]}", len(different), 0)
    thin = Image.fromarray(fx.picture(6000, 1))
    try:
        failed = not image_transform.VariableSizeImageTransform(560)(thin, 4)
    except ValueError:
        failed = M.cut_tiles(thin, 560)[0].shape == (4, 3, 560, 560)
    known("pictures: 6000 x 1 pixels shrink to no row, which Meta's transform refuses; we keep one", failed)
    transform, random, different = image_transform.VariableSizeImageTransform(560), np.random.RandomState(0), 0
    canvases = torch.tensor(transform.find_supported_resolutions(4, 560))
    for width, height in random.randint(1, 3000, (4000, 2)).tolist():
        scales = [min(r * 560 / height, c * 560 / width) for r, c in M.RATIOS]
        best = min((s for s in scales if s >= 1), default=max(scales))
        rows, cols = min((ratio for ratio, s in zip(M.RATIOS, scales) if s == best), key=np.prod)
        different += transform.get_best_fit((width, height), canvases) != (cols * 560, rows * 560)
    report("pictures: canvases of 4,000 random sizes that differ", different, 0)
    clear = np.dstack([fx.picture(30, 20), np.zeros((20, 30), np.uint8)])  # wholly transparent
    theirs = Image.open(io.BytesIO(png(clear))).convert("RGB")  # as encode_content does
    known("pictures: what is transparent is white to us (as to transformers); Meta's chat format drops the alpha",
          (np.asarray(M.open_image(png(clear))) != np.asarray(theirs)).any())


# ---------------------------------------------------------------- token ids


def byte_letters():
    """The printable letter that byte-level BPE writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def our_tokenizer(theirs, folder):
    """A tokenizer.json of Meta's tokenizer.model and special tokens, loaded as ours."""
    ranks, letters = theirs.model._mergeable_ranks, byte_letters()

    def spelled(token):
        return "".join(letters[b] for b in token)
    # Meta's BPE joins any two tokens that make a third one, in the order of the third ones.
    merges = [(spelled(token[:i]), spelled(token[i:])) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]
    bpe = BPE(models.BPE({spelled(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(theirs.pat_str), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    names = [n for n, _ in sorted(theirs.special_tokens.items(), key=lambda pair: pair[1])]
    names[names.index(M.IMAGE)] = "<|reserved_special_token_image|>"  # 128011; the model's own is 128256, behind lm_head
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in [*names, M.IMAGE]])
    bpe.save(str(folder / "tokenizer.json"))
    return M.load_tokenizer(folder)


DATES = f"Cutting Knowledge Date: December 2023\nToday Date: {M.DATE}\n\n"
TEXTS = ["", "Cards: A, 9, J, 5. Make 24.", 'JQK=11,12,13\n\n{"formula": "(13-10)*2*1"}\n', "Überqueren Sie die Straße\tdann 東へ 🚶‍♀️ 100m",
         "   three spaces, 1234567 and don't  ", "it spells <|eot_id|> and <|image|>", "a" * 500 + " " * 300 + "\r\n\r\nx"]


def token_ids():
    """Texts, prompts and turns in ids."""
    theirs = tokenizer.Tokenizer.get_instance()
    with tempfile.TemporaryDirectory() as folder:
        ours = our_tokenizer(theirs, Path(folder))
    chat, picture = chat_format.ChatFormat(theirs), png(fx.picture(8, 8))
    plain = [*TEXTS, *(M.__doc__ + Path(M.__file__).read_text("utf-8")).split("\n\n"), " \n \n\n  x", "\u2028\u00a0\ufeff\x00", "e\u0301ﬁ"]
    report(f"token ids of {len(plain)} texts, texts that differ", sum(ours.encode(t) != theirs.encode(t, bos=False, eos=False) for t in plain), 0)
    report("their decoded texts that differ", sum(ours.decode(ours.encode(t)) != theirs.decode(ours.encode(t)) for t in plain), 0)

    def message(role, text, images=0):
        images = [datatypes.RawMediaItem(data=io.BytesIO(picture)) for _ in range(int(images))]
        return datatypes.RawMessage(role=role, content=[*images, datatypes.RawTextItem(text=text)])

    def prompt(text, images=0, system="", turns=()):
        """Meta's ids and ours of a conversation; turns: (answer, next text, its pictures)."""
        talk = [message("user", text, images)] if images else [message("system", DATES + system), message("user", text)]
        mine = ours.prompt(text, images, system)
        for answer, text, images in turns:
            talk += [message("assistant", answer), message("user", text, images)]
            mine = mine + ours.encode(answer) + [ours.eot] + ours.turn(text, images)
        return chat.encode_dialog_prompt(talk).tokens, mine
    dialogs = [(f"text {i}{', a picture' * images}", prompt(text, images)) for i, text in enumerate(TEXTS) for images in (0, 1)]
    dialogs += [("two pictures", prompt(TEXTS[1], 2)), ("a line break behind a picture", prompt("\nx", 1)),
                ("a system message", prompt(TEXTS[1], 0, "You are a player.")),
                ("three turns", prompt(TEXTS[1], 0, "", [(TEXTS[2], "wrong, again", 0), ("7", "right", 0)])),
                ("three turns with pictures", prompt(TEXTS[1], 1, "", [(TEXTS[2], "wrong, again", 0), ("", "next", 1)]))]
    for what, (meta_ids, our_ids) in dialogs:
        report(f"prompt: {what}: {len(our_ids)} ids, differing", sum(a != b for a, b in zip(meta_ids, our_ids)) + abs(len(meta_ids) - len(our_ids)), 0)
    a, b = prompt("\nx")
    known(f"prompt: a text that begins with a line break: Meta encodes the header's apart ({len(a)} ids), the hub's template and we "
          f"together ({len(b)})", a != b and ours.bpe.decode(a, skip_special_tokens=False) == ours.bpe.decode(b, skip_special_tokens=False))
    stops = {theirs.special_tokens[name] for name in M.STOPS}
    report("stop, padding and image ids that differ", len(stops ^ ours.stop_ids) + (ours.pad != theirs.pad_id) + (ours._id(M.IMAGE) != 128256), 0)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    of_11b = [i + k for k, i in enumerate(spread(32, 8))]
    report(f"cross layers of the 11B: {of_11b}", int(tuple(of_11b) != M.TextConfig().cross_attention_layers), 0)
    report("and of \"published\"", int(tuple(i + k for k, i in enumerate(spread(4, 2))) != PUBLISHED.text.cross_attention_layers), 0)
    fx.CASES["published"] = (PUBLISHED, 4, *fx.CASES["grouped"][2:])
    for name, (config, seed, *_) in fx.CASES.items():
        compare(name, config, seed)
    from_pictures(PUBLISHED)
    pictures()
    token_ids()
    print("all agree" if all(GOOD) else "THERE ARE DIFFERENCES")
    return 0 if all(GOOD) else 1


if __name__ == "__main__":
    sys.exit(main())

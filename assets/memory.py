"""Parameters by part and memory by use, before a model is loaded: an estimate, nothing is made or read.

    python -m assets.memory --size 11b --group 16 --images 1
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import Parser, number, run_main  # noqa: E402
from model import SIZES, Config, LlamaVision, add_lora, count_parameters, image_tokens  # noqa: E402


def parameter_parts(model):
    """{part of the model: [parameters, tensors]}."""
    parts = {}
    cross = model.config.text.cross_attention_layers
    for name, p in model.named_parameters():
        part, layer = name.removeprefix("language_model.model.").split(".")[:2]
        if part == "layers":
            part = "cross layers" if int(layer) in cross else "self layers"
        elif part == "language_model":
            part = layer
        count = parts.setdefault(part, [0, 0])
        count[0] += p.numel()
        count[1] += 1
    return parts


def estimate_memory(config: Config, settings) -> dict[str, dict[str, float]]:
    """{"training", "recompute", "rollout": {use: bytes}}; settings: the flags of parse_args.

    Products of sizes, which met eleven peaks on an H200 within 2 % (tests/test_checkpoints.py). Not
    in them: prompts that rows of a training pass share, the CUDA context, workspaces,
    fragmentation.
    """
    s = settings
    c = config.text
    v = config.vision
    n = getattr(torch, settings.dtype).itemsize
    with torch.device("meta"):
        model = LlamaVision(config)
    if s.lora_rank:
        add_lora(model, s.lora_rank, 1.0)
    count = count_parameters(model)
    full = not s.lora_rank
    both = {"weights": (count["decoder"] + count["vision"]) * n, "adapters": count["adapters"] * 4,
            "optimizer": count["trained"] * OPTIMIZER[s.optimizer_state]}
    D, F, V = c.hidden_size, c.intermediate_size, c.vocab_size
    C, I = v.hidden_size, v.intermediate_size
    Q = c.num_attention_heads * c.head_dim
    KV = c.num_key_value_heads * c.head_dim
    cross = len(c.cross_attention_layers)
    own = c.num_hidden_layers - cross
    cross *= s.images > 0  # without an image the cross layers are skipped
    P = image_tokens(config)
    slots = v.max_num_tiles * (v.tokens + -v.tokens % 8)

    # Training. Bytes that a token leaves in a layer for the backward pass: norms keep their input
    # in float32, trained ones their result too; then inputs of the projections, queries, keys,
    # values and the four of the MLP. With recompute only the input of the layer.
    norm = 4 + n * full
    own_layer = 2 * D * norm + n * (2 * D + 2 * Q + 2 * KV + 4 * F)
    cross_layer = own_layer + Q * norm + n * (2 * Q - 2 * KV)
    image_keys = KV * (norm + 2 * n)
    vision_layer = n * (8 * C + 2 * I + slots)  # slots: the mask
    tokens = s.micro_batch * (s.prompt_tokens + s.new_tokens)
    scored = s.micro_batch * s.new_tokens
    images = max(1, s.micro_batch // s.group) * s.images
    logits, mlp = scored * V * (8 + n), tokens * 4 * F * n  # of the backward pass
    columns = {}
    for name, layers, beside in (
            ("training", (own_layer, cross_layer, image_keys, vision_layer), mlp),
            ("recompute", (D * n, D * n, 0, C * n), mlp + tokens * own_layer)):
        image = P * (D * n + cross * layers[2])
        if full:  # the tower is trained: its layers, its output, its embeddings, the pixels
            image += slots * (v.num_hidden_layers + v.num_global_layers) * layers[3]
            image += P * n * (v.output_dim + 2 * C) + 12 * slots * v.patch_size**2
        token = own * layers[0] + cross * layers[1] + D * norm + 2 * c.head_dim * n
        columns[name] = both | {"gradients": count["trained"] * (n if full else 4),
                                "kept for backward": (tokens * token + images * image
                                                      + scored * V * 4),
                                "other activations": max(logits, beside)}

    encoded = slots * (vision_layer + slots)  # of one image, all layers one after the other
    columns["rollout"] = both | rollout_memory(config, s, n, encoded)
    return columns


def rollout_memory(config, s, n, encoded):
    """{use: bytes} of a rollout beside the weights; n bytes a number, `encoded` for an image in the
    tower. Prompts are read and images encoded once for a group, all of a batch at once."""
    c = config.text
    cross = len(c.cross_attention_layers)
    KV = c.num_key_value_heads * c.head_dim
    pair = 2 * KV * n  # a key and a value of one token in one layer
    prompts = s.batch // s.group
    seen = prompts * s.images * image_tokens(config)
    length = s.prompt_tokens + s.new_tokens
    kept = {"KV cache": s.batch * length * (c.num_hidden_layers - cross) * pair,
            "cross-attention K/V": seen * cross * pair, "image features": seen * n * c.hidden_size}
    layer = 2 * c.hidden_size + 3 * c.intermediate_size
    reading = max(prompts * s.prompt_tokens * n * layer, seen * KV * (8 + n))
    encoding = prompts * s.images * encoded - sum(kept.values())
    drawing = s.batch * c.vocab_size * (20 + n)
    return kept | {"other activations": max(reading, encoding, drawing)}


OPTIMIZER = {"float32": 8, "bfloat16": 4}  # bytes of AdamW's state for a trained parameter
FLAGS = {"batch": (64, 1, 4096, "rows of a rollout"),  # default, least, most
         "micro-batch": (8, 1, 4096, "rows of a training pass"),
         "group": (1, 1, 4096, "rows that share a prompt and its images"),
         "images": (1, 0, 16, "images of a prompt; all 4 slots of tiles are kept"),
         "prompt-tokens": (256, 1, 2**17, "of a prompt"),
         "new-tokens": (64, 1, 2**17, "of an answer"),
         "lora-rank": (32, 0, 4096, "of the adapters; 0: full fine-tuning")}


def parse_args(argv=None):
    """The flags. ValueError with one sentence for numbers out of range."""
    parser = Parser("Parameters by part, memory by use: an estimate.")
    flag = parser.add_argument
    flag("--size", choices=SIZES, default="11b", help="architecture")
    for name, (default, least, most, text) in FLAGS.items():
        number(parser, f"--{name}", default, least, most, text)
    flag("--recompute", action="store_true", help="no column without checkpointing")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
         help="of weights; full fine-tuning with AdamW has float32")
    flag("--optimizer-state", choices=OPTIMIZER, default="float32",
         help="AdamW's moments; bfloat16: as train_sft.py --optimizer adamw16 has them")
    settings = parser.parse_args(argv)
    sizes = settings.micro_batch, settings.group
    if settings.batch % settings.group or max(sizes) % min(sizes):
        raise ValueError("--batch must be a multiple of --group; --micro-batch a multiple or a part of "
                         "it.")
    return settings


def main(argv=None):
    """Prints the estimate and returns {column: {use: bytes}}."""
    settings = parse_args(argv)
    with torch.device("meta"):
        parts = parameter_parts(LlamaVision(SIZES[settings.size]))
    parts["all"] = [sum(counts) for counts in zip(*parts.values())]
    for part, (count, tensors) in parts.items():
        print(f"{part:24}{count:>16,} parameters in {tensors:>3} tensors")
    columns = estimate_memory(SIZES[settings.size], settings)
    if settings.recompute:
        del columns["training"]

    def line(label, cells):
        print(f"{label:24}" + "".join(f"{cell:>12}" for cell in cells))
    print("\n" + ", ".join(f"{key} {value}" for key, value in vars(settings).items()))
    line("GB (10^9 bytes)", columns)
    for use in columns["recompute"] | columns["rollout"]:
        line(use, [f"{column.get(use, 0) / 1e9:.3f}" for column in columns.values()])
    totals = [sum(column.values()) / 1e9 for column in columns.values()]
    line("all", [f"{total:.3f}" for total in totals])
    for limit in (80, 141):
        line(f"fits in {limit} GB", ["yes" if total <= limit else "no" for total in totals])
    print("An estimate, not measured on a GPU: fragmentation, the CUDA context and kernels'\n"
          "workspaces are not counted. A board holds about 6 % more than its name says, for these.")
    return columns


if __name__ == "__main__":
    run_main(main)

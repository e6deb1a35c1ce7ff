"""Do transformers and peft read what model.py writes, to the same logits, and the other way round? By hand, not in `make test`:

    python3 -m venv /tmp/oracle && /tmp/oracle/bin/pip install torch==2.13.0 transformers peft pillow
    /tmp/oracle/bin/python tests/check_transformers.py

Checked with transformers 5.23.0 and peft 0.21.2. Eager attention, float32, and our two switches set to transformers'
semantics (see Config): what is compared here is files, not semantics.
"""

import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as M  # noqa: E402
from assets import make_base  # noqa: E402


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def tokenizer():
    return make_base.train_tokenizer(["Q 3 10 4, JQK=11,12,13, make 24", '{"formula": "(13-10)*2*1"}'] * 3, 300)


def fresh(tok):
    """A small random model with transformers' semantics, gates open."""
    text = M.TextConfig(tok.bpe.get_vocab_size() - 1, 32, 48, 4, 4, 2, (2,), rope_theta=100.0, rope_factor=2.0, rope_original=16)
    taps = "input" if VERSION < (4, 55) else "output"
    config = M.Config(text, M.VisionConfig(24, 2, 32, 3, 1, 4, 12, 4, (1, 2)), taps, False)
    model = make_base.init_weights(M.LlamaVision(config), 0)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return model


def with_adapter(model):
    M.add_lora(model, 4, 6.0, tuple(M.PARTS.values()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


IDS = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(3))
PIXELS = torch.randn(2, 4, 3, 12, 12, generator=torch.Generator().manual_seed(4))  # of the fourth tile nothing is seen


def pictured(image_token):
    return torch.cat([torch.full((2, 1), image_token), IDS], 1)


@torch.no_grad()
def ours(model):
    """Logits of texts, and of the same behind a picture of three tiles."""
    image = model.encode_images(PIXELS[:, None], torch.tensor([[7], [7]]))
    seen = model(pictured(model.config.text.vocab_size), image)
    return torch.cat([model.logits(model(IDS)), model.logits(seen)], 1)


@torch.no_grad()
def theirs(model):
    ids = pictured(model.config.image_token_index)
    tiles = torch.tensor([1, 1, 1, 0]).expand(2, 1, 4)
    seen = model(input_ids=ids, pixel_values=PIXELS[:, None], aspect_ratio_ids=torch.tensor([[7], [7]]), aspect_ratio_mask=tiles,
                 cross_attention_mask=tiles[:, None].expand(-1, ids.shape[1], -1, -1))
    return torch.cat([model(input_ids=IDS).logits.float(), seen.logits.float()], 1)


@torch.no_grad()
def our_features(model, pixels):
    states = model.vision_model(pixels, torch.tensor([7, 7]), torch.tensor([[1, 1, 1, 0]] * 2))
    return model.multi_modal_projector(states).flatten(1, 2)


@torch.no_grad()
def their_features(model, pixels):
    model = model if VERSION < (4, 52) else model.model
    shown = model.vision_model(pixels[:, None], torch.tensor([[7], [7]]), torch.tensor([[[1, 1, 1, 0]]] * 2))
    return model.multi_modal_projector(shown[0]).flatten(1, 3)


def read(directory):
    return transformers.MllamaForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32, attn_implementation="eager").eval()


def report(what, a, b, tolerance=2e-5):
    error = ((a - b).abs().max() / a.abs().max()).item()
    print(f"{'ok ' if error < tolerance else 'BAD'} {error:.1e}  {what}")
    return error < tolerance


def main():
    work, tok, good = Path(tempfile.mkdtemp()), tokenizer(), True
    base = fresh(tok)
    for name, size in (("one", 5 * 10**9), ("shards", 40_000)):
        M.save_model(base, tok, work / name, shard_bytes=size)
        hf = read(work / name)
        good &= report(f"transformers reads ours, {name} ({len(list((work / name).glob('*.safetensors')))} file(s))", ours(base), theirs(hf))
        good &= report("   and its image features", our_features(base, PIXELS), their_features(hf, PIXELS))
    M.save_model(base, tok, work / "bf16", torch.bfloat16)
    hf = transformers.MllamaForConditionalGeneration.from_pretrained(work / "bf16", torch_dtype="auto")
    print(f"    a bfloat16 save comes in as {hf.dtype}")

    hf = read(work / "one")
    hf.save_pretrained(work / "theirs")
    hf.save_pretrained(work / "theirs-shards", max_shard_size="40KB")
    hf.save_pretrained(work / "memory")
    save_file({n: t.contiguous() for n, t in hf.state_dict().items()}, work / "memory" / M.WEIGHTS)
    for name in ("theirs", "theirs-shards", "memory"):
        (work / name / "tokenizer.json").write_bytes((work / "one" / "tokenizer.json").read_bytes())
        names = M.read_header(next((work / name).glob("*.safetensors"))).keys()
        good &= report(f"we read transformers', {name}: {min(names)} ...", theirs(hf), ours(M.load_model(work / name)[0]))

    adapted = with_adapter(M.load_model(work / "one")[0])
    M.save_adapter(adapted, work / "adapter", work / "one")
    px = peft.PeftModel.from_pretrained(read(work / "one"), work / "adapter").eval()
    good &= report("peft reads our adapter of decoder, projector and tower", ours(adapted), theirs(px))
    px = peft.AutoPeftModel.from_pretrained(work / "adapter", torch_dtype=torch.float32, attn_implementation="eager").eval()
    good &= report("and so does its AutoPeftModel", ours(adapted), theirs(px))
    good &= report("we read our adapter", ours(adapted), ours(M.load_model(work / "adapter")[0]))
    for name, targets in (("pattern", r".*language_model\.(model\.)?layers\..*_proj"), ("list", ["q_proj", "fc1"])):
        for rs in (False, True):
            px = peft.get_peft_model(read(work / "one"), peft.LoraConfig(
                r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, use_rslora=rs)).eval()
            px.save_pretrained(work / f"peft-{name}")
            names = M.read_header(work / f"peft-{name}" / M.ADAPTER).keys()
            good &= report(f"we read peft's adapter, {name}, rslora {rs}: {min(names)[:60]} ...", theirs(px), ours(M.load_model(work / f"peft-{name}")[0]))
    M.save_model(adapted, tok, work / "merged")
    good &= report("transformers reads our merged adapter", ours(adapted), theirs(read(work / "merged")))
    print(f"transformers {transformers.__version__}, peft {peft.__version__}: {'all agree' if good else 'THERE ARE DIFFERENCES'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

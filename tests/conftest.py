"""What several test files need: a small random model, its tokenizer, and the repository on the path."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model as M  # noqa: E402
import tasks  # noqa: E402
from assets import make_base  # noqa: E402


def pytest_configure():
    """Two threads of one test process only get in each other's way on models this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer learned from a few hundred problems."""
    texts = []
    for i in range(300):
        p = tasks.make("gp-l", "11,12,13" if i % 2 else "10", index=i, style="short", attempts=3)
        texts += [p.prompt, p.expert(), "18, not 24.", "10 is not on the cards.", "7 is missing.", "Not a legal formula."]
    return make_base.train_tokenizer(texts, 400)


def load_tensors(path):
    """All tensors of a safetensors file by name, read as model.py reads them."""
    header = M.read_header(path)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, _) in header.items()}
    M.read_tensors(path, header, tensors)
    return tensors


def standing(walk, position):
    """(walk, texts): a copy of a walk that stands at a position, and the conversation that leads there with right answers."""
    walker, texts = walk.restarted(), []
    while walker.position < position:
        response, step = walker.advance()
        texts += [response, step.feedback]
    walker.judged_by = walk.judged_by
    return walker, texts


def small_config(tokenizer):
    """A config of a few thousand parameters with every mechanism in it: grouped heads, a cross layer, stretched RoPE."""
    text = M.TextConfig(tokenizer.bpe.get_vocab_size() - 1, 32, 48, 4, 4, 2, (2,), rope_theta=100.0, rope_factor=2.0,
                        rope_original=16)
    return M.Config(text, M.VisionConfig(24, 2, 32, 3, 1, 4, 12, 4, (1, 2)))


@pytest.fixture
def model(tokenizer):
    """A random model whose logits are far from uniform, so that errors show."""
    model = make_base.init_weights(M.LlamaVision(small_config(tokenizer)), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run directory with a tiny base trained for two steps: something to start the scripts from."""
    out = tmp_path_factory.mktemp("runs") / "base"
    make_base.main(f"--fresh --steps 2 --batch 16 --eval-n 4 --out {out} --device cpu --rules 10 --demonstrators careful:2 retry:1".split())
    return out


@pytest.fixture(scope="session")
def sft_run(tiny_run, tmp_path_factory):
    """A run of train_sft.py, two steps long, that began from the tiny base."""
    import train_sft
    out = tmp_path_factory.mktemp("runs") / "sft"
    train_sft.main(f"--init {tiny_run} --steps 2 --batch 16 --eval-n 4 --out {out} --device cpu".split())
    return out

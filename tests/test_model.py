"""model.py: the same numbers however they are computed."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import model as M
from assets import make_base
from conftest import ROOT, load_tensors, small_config
from fake_graph import Capture, FakeGraph, noting
from make_fixtures import masked_forward, pad_left


def ids_of(tokenizer, count, seed=0):
    return torch.randint(0, tokenizer.bpe.get_vocab_size() - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


# ---- forward: padding, batching, cache

def test_right_padding_left_padding_and_alone_agree(model, tokenizer):
    rows = [ids_of(tokenizer, n, seed=n) for n in (3, 9, 6)]
    right, lengths = M.pad_rows(rows, tokenizer.pad, "cpu")
    left, _ = pad_left(rows, tokenizer.pad)
    width = right.shape[1]
    real_left = torch.arange(width) >= (width - lengths)[:, None]
    real_right = torch.arange(width) < lengths[:, None]
    plain, masked, from_left = model(right), masked_forward(model, right, real_right), masked_forward(model, left, real_left)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row]))[0]
        assert alone.abs().max() > 0.1
        for hidden in (plain[i, : len(row)], masked[i, : len(row)], from_left[i, width - len(row) :]):
            close(hidden, alone)


def test_left_padding_needs_its_mask(model, tokenizer):
    left, lengths = pad_left([ids_of(tokenizer, 4), ids_of(tokenizer, 8)], tokenizer.pad)
    real = torch.arange(8) >= (8 - lengths)[:, None]
    assert (model(left)[0, -1] - masked_forward(model, left, real)[0, -1]).abs().max() > 1e-2


def test_cached_equals_uncached_in_uneven_pieces(model, tokenizer):
    rows = [ids_of(tokenizer, n, seed=n) for n in (12, 7, 10)]
    cuts = [(5, 6, 12), (2, 6, 7), (4, 9, 10)]
    cache = M.Cache(model, 3, 12)
    done = [0, 0, 0]
    with torch.no_grad():
        for turn in range(3):
            pieces = [row[a : c[turn]] for row, a, c in zip(rows, done, cuts)]
            done = [c[turn] for c in cuts]
            ids, lengths = M.pad_rows(pieces, tokenizer.pad, "cpu")
            logits = model.extend(cache.reserve(ids.shape[1]), ids, lengths)
            for i, row in enumerate(rows):
                close(logits[i], model.logits(model(torch.tensor([row[: done[i]]])))[0, -1], 1e-4)
    assert cache.length.tolist() == [12, 7, 10]


def test_cache_shared_by_a_group_and_rows_dropped(model, tokenizer):
    prompts = [ids_of(tokenizer, 4), ids_of(tokenizer, 6, seed=5)]
    ids, lengths = M.pad_rows(prompts, tokenizer.pad, "cpu")
    cache = M.Cache(model, 2, 8)
    with torch.no_grad():
        model.extend(cache, ids, lengths)
        cache.select(torch.tensor([0, 0, 1, 1])).select(torch.tensor([3, 0]))
        logits = model.extend(cache.reserve(1), torch.tensor([[7], [9]]), torch.tensor([1, 1]))
        close(logits[0], model.logits(model(torch.tensor([prompts[1] + [7]])))[0, -1], 1e-4)
        close(logits[1], model.logits(model(torch.tensor([prompts[0] + [9]])))[0, -1], 1e-4)


def test_cache_that_is_too_small_says_so(model):
    with pytest.raises(ValueError, match="do not fit"):
        M.Cache(model, 1, 3).next_slots(4)


# ---- generation

def greedy_by_hand(model, prompt, stops, most):
    out = []
    while len(out) < most and (not out or out[-1] not in stops):
        out.append(int(model.logits(model(torch.tensor([prompt + out])))[0, -1].argmax()))
    return out


@torch.no_grad()
def test_batched_generation_equals_each_prompt_alone(model, tokenizer):
    prompts = [ids_of(tokenizer, n, seed=n) for n in (3, 11, 6, 8)]
    alone = [greedy_by_hand(model, p, set(), 9) for p in prompts]
    stops = {alone[1][2], alone[3][5]}  # so that rows end at different steps
    expected = [greedy_by_hand(model, p, stops, 9) for p in prompts]
    assert len({len(e) for e in expected}) > 1
    ids, lengths = M.pad_rows(prompts, tokenizer.pad, "cpu")
    cache = M.Cache(model, 4, ids.shape[1] + 9)
    responses, log_probs = M.generate(model, cache, model.extend(cache, ids, lengths), M.Sampling(9, temperature=0), stops)
    assert responses == expected
    for prompt, response, lp in zip(prompts, responses, log_probs):
        full = model.logits(model(torch.tensor([prompt + response])))[0].log_softmax(-1)
        by_hand = [full[len(prompt) + i - 1, t].item() for i, t in enumerate(response)]
        assert lp == pytest.approx(by_hand, abs=1e-4)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20000, 1)
    token, log_p = M.sample(logits, 0.5, torch.rand(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    p = (logits[0] / 0.5).softmax(-1)
    assert torch.allclose(torch.bincount(token, minlength=3) / 20000, p, atol=0.015)
    assert torch.allclose(log_p, p.log()[token], atol=1e-6)


# ---- log-probabilities

def test_log_probs_by_hand(model, tokenizer):
    ids = torch.tensor([ids_of(tokenizer, 7), ids_of(tokenizer, 7, seed=3)])
    chosen = torch.tensor([[0, 0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0, 1]]).bool()
    log_probs = model.log_probs(ids, chosen, temperature=0.7)
    expected = []
    for b, t in chosen.nonzero().tolist():
        row = (model.logits(model(ids[b : b + 1, :t]))[0, -1] / 0.7).log_softmax(-1)
        expected.append(row[ids[b, t]].item())
    assert log_probs.tolist() == pytest.approx(expected, abs=1e-4)


# ---- LoRA and gradient checkpointing

def adapted(model):
    M.add_lora(model, 3, 6.0)
    return model


def with_random_b(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, M.Linear) and module.lora_B is not None:
            torch.nn.init.normal_(module.lora_B.weight, std=0.2)
    return model


def test_lora_starts_as_identity_and_switches_off(model, tokenizer):
    ids = torch.tensor([ids_of(tokenizer, 8)])
    before = model(ids)
    adapted(model)
    assert torch.equal(model(ids), before)
    with_random_b(model)
    assert (model(ids) - before).abs().max() > 1e-2
    with M.adapters_off(model):
        assert torch.equal(model(ids), before)
    assert (model(ids) - before).abs().max() > 1e-2


def test_lora_merges_to_the_same_logits(model, tokenizer, tmp_path):
    with_random_b(adapted(model))
    ids = torch.tensor([ids_of(tokenizer, 8)])
    M.save_model(model, tokenizer, tmp_path / "merged")
    merged, _ = M.load_model(tmp_path / "merged")
    close(merged.logits(merged(ids)), model.logits(model(ids)), 1e-3)


def test_lora_goes_out_and_comes_in_with_pefts_names(model, tokenizer, tmp_path):
    M.save_model(model, tokenizer, tmp_path / "base")
    with_random_b(adapted(model))
    M.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    back, _ = M.load_model(tmp_path / "adapter")
    ids = torch.tensor([ids_of(tokenizer, 8)])
    assert torch.equal(back(ids), model(ids))
    names = load_tensors(tmp_path / "adapter" / M.ADAPTER).keys()
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in names


@pytest.mark.parametrize("recompute", [False, True])
def test_every_adapter_in_use_gets_a_gradient(model, tokenizer, recompute):
    with_random_b(adapted(model))
    model.recompute(recompute)
    image = M.ImageContext(torch.randn(1, 5, 32), torch.ones(1, 1, 1, dtype=torch.bool))
    ids = torch.tensor([ids_of(tokenizer, 8)])
    ids[0, 0] = model.config.text.vocab_size  # <|image|>
    log_probs = model.log_probs(ids, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]).bool(), image=image)
    log_probs.sum().backward()
    for name, p in model.named_parameters():
        if ".lora_" in name:
            assert p.grad is not None and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name


def test_recompute_changes_memory_not_gradients(model, tokenizer):
    ids, chosen = torch.tensor([ids_of(tokenizer, 8)]), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    grads = []
    for on in (False, True):
        model.recompute(on)
        model.zero_grad()
        model.log_probs(ids, chosen).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name in grads[0]:
        close(grads[0][name], grads[1][name])


# ---- cross attention and the tower: shapes, and what may be seen

def image_context(model):
    """One image of three tiles."""
    tiles = torch.randn(1, 1, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    context = model.encode_images(tiles, torch.tensor([[7]]))
    assert context.features.shape == (1, 4 * 10, 32) and context.tiles.tolist() == [[[True, True, True, False]]]
    return context


def test_tokens_before_the_image_are_those_of_a_text_only_call(model, tokenizer):
    ids = torch.tensor([ids_of(tokenizer, 8)])
    blind = model(ids, image=image_context(model))  # no <|image|> in it
    close(blind, model(ids))
    ids[0, 3] = model.config.text.vocab_size
    seen, plain = model(ids, image=image_context(model)), model(ids)
    close(seen[:, :3], plain[:, :3])
    assert (seen[:, 3:] - plain[:, 3:]).abs().max() > 1e-2


def test_unseen_image_tokens_do_not_matter(model, tokenizer):
    ids = torch.tensor([ids_of(tokenizer, 8)])
    ids[0, 2] = model.config.text.vocab_size
    context = image_context(model)
    before = model(ids, image=context)
    context.features[:, 30:] += 5.0
    close(before, model(ids, image=context))
    context.features[:, 29] += 5.0
    assert (before - model(ids, image=context)).abs().max() > 1e-3


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_tower_shapes(size):
    with torch.device("meta"):
        model = M.LlamaVision(M.SIZES[size])
        v = M.SIZES[size].vision
        tiles = torch.zeros(2, 4, 3, v.image_size, v.image_size)
        out = model.vision_model.encode(tiles, torch.zeros(2, dtype=torch.long), 3)  # real tiles are counted, which meta cannot
        assert out.shape == (2, 4, v.tokens, v.output_dim)
        assert model.multi_modal_projector(out).shape[-1] == M.SIZES[size].text.hidden_size


def test_sizes():
    with torch.device("meta"):
        big = M.LlamaVision(M.SIZES["11b"])
        tiny = M.count_parameters(M.LlamaVision(M.SIZES["tiny"]))
    assert len(big.state_dict()) == 906
    assert sum(p.numel() for p in big.parameters()) == 10_670_220_835
    assert tiny["decoder"] <= 900_000 and tiny["vision"] <= 700_000
    names = big.state_dict()
    assert names["vision_model.gated_positional_embedding.tile_embedding.weight"].shape == (9, 8197120)
    assert names["language_model.model.layers.3.cross_attn.k_norm.weight"].shape == (128,)
    assert names["language_model.model.embed_tokens.weight"].shape == (128264, 4096)


def test_llama3_rope_stretches_low_frequencies_only():
    c = M.TextConfig()
    plain = c.rope_theta ** (-torch.arange(0, 128, 2) / 128)
    ours = M.rope_frequencies(c)
    wavelength = 2 * math.pi / plain
    assert torch.allclose(ours[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    assert torch.allclose(ours[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and ((ours < plain) & (ours > plain / 8))[between].all()


# ---- tokenizer and chat

def test_special_tokens_come_from_ids_never_from_text(tokenizer):
    special = {tokenizer.bpe.token_to_id(name) for name in make_base.TINY_SPECIAL}
    for name in make_base.TINY_SPECIAL:
        ids = tokenizer.encode(f"a{name}b")
        assert not special & set(ids)
        assert tokenizer.decode(ids) == f"a{name}b"


def test_chat_of_the_tiny_model(tokenizer):
    name = tokenizer.bpe.id_to_token
    ids = tokenizer.prompt("24") + tokenizer.encode("7") + [tokenizer.eot] + tokenizer.turn("no")
    assert [name(i) for i in ids if name(i).startswith("<|")] == [
        M.BOS, "<|user|>", M.EOT, "<|assistant|>", M.EOT, "<|user|>", M.EOT, "<|assistant|>"]
    assert [name(i) for i in tokenizer.prompt("24", image=True)[:3]] == [M.BOS, "<|user|>", M.IMAGE]


def test_image_token_lies_outside_the_output_layer(tokenizer):
    assert tokenizer.bpe.token_to_id(M.IMAGE) == 400 == tokenizer.bpe.get_vocab_size() - 1  # conftest asks for 400
    for base in (ROOT / "assets").glob("tiny-*"):
        config = M.config_from_json(M.read_json(base / "config.json"))
        assert M.load_tokenizer(base).bpe.token_to_id(M.IMAGE) == config.text.vocab_size


def test_cards_numbers_and_operators_are_single_tokens(tokenizer):
    ids = tokenizer.encode('{"cards": ["K", "10", "2", "A"], "number": [13, 10, 2, 1], "formula": "(13-10)*2*1"}')
    pieces = [tokenizer.bpe.id_to_token(i) for i in ids]
    for piece in ("K", "10", "13", "(", ")", "-", "*"):
        assert piece in pieces
    assert len(ids) <= 34


def test_llama_chat_format():
    """The published format, spelled with a byte-level tokenizer that has the published special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    bpe = M.BPE(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (
        M.BOS, M.PAD, "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", M.EOT, M.IMAGE)])
    tokenizer = M.Tokenizer(bpe)
    spelled = lambda ids: bpe.decode(ids, skip_special_tokens=False)
    assert spelled(tokenizer.prompt("Hi", image=True)) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>Hi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert spelled(tokenizer.prompt("Hi")) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert len(tokenizer.stop_ids) == 3


# ---- saving and loading

def test_model_directory_round_trip(model, tokenizer, tmp_path):
    M.save_model(model, tokenizer, tmp_path)
    back, tok = M.load_model(tmp_path)
    assert back.config == model.config
    assert tok.encode("K 7 2 A") == tokenizer.encode("K 7 2 A")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_config_reads_both_layouts_of_rope():
    new = M.config_to_json(M.SIZES["11b"])
    assert M.config_from_json(json.loads(json.dumps(new))) == M.SIZES["11b"]
    rope = new["text_config"].pop("rope_scaling") | {"rope_theta": new["text_config"].pop("rope_theta")}
    new["text_config"]["rope_parameters"] = rope
    assert M.config_from_json(new) == M.SIZES["11b"]


@pytest.mark.parametrize("change, words", [
    (lambda d: d.update(model_type="llama"), "mllama"),
    (lambda d: d["text_config"].update(hidden_size=-4), "hidden_size"),
    (lambda d: d["text_config"].update(hidden_size="big"), "must be a number"),
    (lambda d: d["text_config"].update(num_attention_heads=5), "divide"),
    (lambda d: d["text_config"].update(num_hidden_layers=10**5), "range"),
    (lambda d: d["vision_config"].update(max_num_tiles=6), "max_num_tiles"),
    (lambda d: d.update(image_token_index=7), "image_token_index"),
])
def test_config_that_cannot_be_meant(change, words):
    data = json.loads(json.dumps(M.config_to_json(M.SIZES["tiny"])))
    change(data)
    with pytest.raises(ValueError, match=words):
        M.config_from_json(data)


def test_wrong_tensors_are_named(model, tokenizer, tmp_path):
    M.save_model(model, tokenizer, tmp_path)
    state = load_tensors(tmp_path / M.WEIGHTS)
    name = "language_model.model.norm.weight"
    for damage, words in ((lambda s: s.pop(name), "lacks"), (lambda s: s.update(extra=torch.zeros(1)), "unknown"),
                          (lambda s: s.update({name: torch.zeros(3)}), "shape")):
        broken = dict(state)
        damage(broken)
        save_file(broken, tmp_path / M.WEIGHTS)
        with pytest.raises(ValueError, match=words):
            M.load_model(tmp_path)
    (tmp_path / M.WEIGHTS).write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="safetensors"):
        M.load_model(tmp_path)


# ---- cost

def test_flops_against_a_count_by_hand(model):
    c = model.config.text
    layer = 2 * c.hidden_size * (32 + 16 + 16 + 32 + 3 * 48)  # q, k, v, o, and three matrices of the MLP
    attention = lambda keys: 4 * 32 * keys  # q k and p v, over all heads
    one_by_one = sum(3 * (layer + attention(t + 1)) for t in range(4, 9)) + 2 * 2 * 32 * c.vocab_size
    cost = lambda *work, **how: M.pass_flops(model, M.text_work(*work), **how)
    assert cost(4, 9, 2) == one_by_one
    whole = cost(0, 9, 3)
    assert whole == cost(0, 4, 1) + cost(4, 9, 2) == M.pass_flops(model, M.add_work([M.text_work(0, 4, 1), M.text_work(4, 9, 2)]))
    assert cost(0, 9, 3, backward=True) == 3 * whole
    model.recompute(True)  # of the layers up to their last product; lm_head is in none
    assert cost(0, 9, 3, backward=True) == 4 * whole - 2 * 32 * (3 * c.vocab_size + 9 * 3 * 48)
    model.requires_grad_(False)
    assert cost(0, 9, 3, backward=True) == whole


def test_flops_against_torchs_counter(model, tokenizer):
    from torch.utils.flop_counter import FlopCounterMode
    ids = torch.tensor([ids_of(tokenizer, 9)])
    with FlopCounterMode(display=False) as counter:
        model.logits(model(ids))
    ours = M.pass_flops(model, M.text_work(0, 9, 9))
    causal = 3 * 4 * 32 * 45  # torch counts attention on some devices as a whole square, on others not at all
    assert counter.get_total_flops() in (ours - causal, ours - causal + 3 * 4 * 32 * 81)


# ---- decoding as it runs on a GPU: all slots attended to, the step captured once and replayed

@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Lengths rounded up, Cache.fixed, and StepGraph with a FakeGraph."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setitem(M.MULTIPLE, "cpu", 64)
    monkeypatch.setattr(M.StepGraph, "__init__", noting(M.StepGraph.__init__))
    FakeGraph.made.clear()


def played(model, tokenizer, prompts, group, temperature, turns=3, image=None):
    """What `group` rows of every prompt write in several turns; rows leave between them, and others get a longer text to read."""
    generator = torch.Generator().manual_seed(4)
    ids, lengths = M.pad_rows(prompts, tokenizer.pad, "cpu")
    found = []
    with torch.no_grad():
        cache = M.Cache(model, len(ids), ids.shape[1], image)
        rows = torch.arange(len(ids)).repeat_interleave(group)
        logits = model.extend(cache, ids, lengths)[rows]
        cache.select(rows)
        told = [prompts[row] for row in rows]
        for turn in range(turns):
            responses, log_probs = M.generate(model, cache, logits, M.Sampling(9, temperature, generator), tokenizer.stop_ids)
            found += [(list(t), r, lp) for t, r, lp in zip(told, responses, log_probs)]
            going = [i for i in range(len(told)) if (i + turn) % 4 != 1]
            if not going or turn + 1 == turns:  # as a rollout: nothing is read that is not answered
                break
            told = [told[i] + responses[i] + ids_of(tokenizer, 2 + i % 3, seed=turn) for i in going]
            cache.select(torch.tensor(going))
            new, count = M.pad_rows([t[n:] for t, n in zip(told, cache.length.tolist())], tokenizer.pad, "cpu")
            logits = model.extend(cache.reserve(new.shape[1]), new, count)
    return found


def ragged(tokenizer, count):
    return [ids_of(tokenizer, n, seed=n) for n in (3, 11, 6, 8)[:count]]


@pytest.mark.parametrize("prompts, group", [(1, 1), (3, 1), (2, 2), (3, 5), (1, 16)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_shared_prompts_and_replayed_steps_change_nothing(model, tokenizer, prompts, group, temperature, request):
    """Against the whole text computed at once; and rows that decode with a graph over all slots against those without."""
    plain = played(model, tokenizer, ragged(tokenizer, prompts), group, temperature)
    for text, response, log_probs in plain:
        whole = model.logits(model(torch.tensor([text + response])))[0] / (temperature or 1)
        at = whole.log_softmax(-1)[len(text) - 1 : -1]
        assert log_probs == pytest.approx(at.gather(1, torch.tensor(response)[:, None])[:, 0].tolist(), abs=1e-5)
        if not temperature:
            assert response == at.argmax(-1).tolist()
    request.getfixturevalue("as_on_a_gpu")
    for again in range(2):
        captured = played(model, tokenizer, ragged(tokenizer, prompts), group, temperature)
        assert [(t, r) for t, r, _ in captured] == [(t, r) for t, r, _ in plain]
        assert all(a == pytest.approx(b, abs=1e-5) for (_, _, a), (_, _, b) in zip(captured, plain))
    assert sum(graph.replays for graph in FakeGraph.made) >= 6


def test_a_prompt_is_kept_once(model, tokenizer):
    ids, lengths = M.pad_rows(ragged(tokenizer, 3), tokenizer.pad, "cpu")
    with torch.no_grad():
        cache = M.Cache(model, 3, ids.shape[1])
        model.extend(cache, ids, lengths)
        cache.select(torch.arange(3).repeat_interleave(16)).reserve(4)
        assert {kv.shape[1:4:2] for kv in cache.kv.values()} == {(48, 4)}
        assert {kv.shape[1:4:2] for kv in cache.prompt.kv.values()} == {(3, 11)}
        cache.select(torch.arange(16, 40))  # no row of the first prompt is left
        assert {kv.shape[1] for kv in cache.prompt.kv.values()} == {2} and cache.prompt.share == 16


def pictures(model, count):
    """An ImageContext of one picture for each of `count` prompts, of one to three tiles."""
    v, generator = model.config.vision, torch.Generator().manual_seed(6)
    tiles = torch.randn(count, 1, 4, 3, v.image_size, v.image_size, generator=generator)
    return model.encode_images(tiles, torch.tensor([[1], [3], [6]])[:count])


def test_a_graph_serves_the_next_rollout_too(model, tokenizer, as_on_a_gpu):
    """Captured once for all rollouts of its shapes, whatever the weights, prompts and pictures; anew where more has changed."""
    image = model.config.text.vocab_size

    def rollout(seed, group=4):
        prompts = [[ids_of(tokenizer, 1)[0], image, *ids_of(tokenizer, 5 + seed + n, seed=seed)] for n in range(3)]
        with torch.no_grad():
            context = pictures(model, 3)
        for text, response, log_probs in played(model, tokenizer, prompts, group, 1.0, turns=1, image=context):
            row = [p == text for p in prompts].index(True)
            whole = model(torch.tensor([text + response]), image=context.select(torch.tensor([row])))
            at = model.logits(whole)[0].log_softmax(-1)[len(text) - 1 : -1]
            assert log_probs == pytest.approx(at.gather(1, torch.tensor(response)[:, None])[:, 0].tolist(), abs=2e-5)
    with torch.no_grad():
        for seed in range(3):
            rollout(seed)
            for p in model.parameters():
                p.mul_(1.02)
        assert len(FakeGraph.made) == 1 and FakeGraph.made[0].replays > 10
        rollout(3, group=2)
        assert len(FakeGraph.made) == 2
        M.add_lora(model, 2, 3.0)
        for linear in M.linear_layers(model).values():
            if linear.lora_A is not None:
                linear.lora_B.weight.normal_(std=0.1)
        for seed in range(2):
            rollout(seed, group=2)
        assert len(FakeGraph.made) == 3
        with M.adapters_off(model):
            rollout(0, group=2)
        assert len(FakeGraph.made) == 4


def test_other_groups_of_the_same_sizes_are_captured_anew(model, tokenizer, as_on_a_gpu):
    ids, lengths = M.pad_rows(ragged(tokenizer, 2), tokenizer.pad, "cpu")
    for rows in ([0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]):
        with torch.no_grad():
            cache = M.Cache(model, 2, ids.shape[1])
            logits = model.extend(cache, ids, lengths)[rows]
            responses, _ = M.generate(model, cache.select(torch.tensor(rows)), logits, M.Sampling(9, 0.0), {-1})
            assert responses == [greedy_by_hand(model, ragged(tokenizer, 2)[row], {-1}, 9) for row in rows]


def test_adapters_are_cast_once_a_response(model, tokenizer, monkeypatch, request):
    M.add_lora(model, 2, 3.0)
    model.to(torch.bfloat16)
    adapted = [linear for linear in M.linear_layers(model).values() if linear.lora_A is not None]
    calls, real = [], M.Linear.cast_lora
    monkeypatch.setattr(M.Linear, "cast_lora", lambda *args: calls.append(1) or real(*args))
    for linear in adapted:
        linear.lora_A.float(), linear.lora_B.float()
    ids, lengths = M.pad_rows(ragged(tokenizer, 3), tokenizer.pad, "cpu")

    def log_probs():
        with torch.no_grad():
            cache = M.Cache(model, 3, ids.shape[1])
            logits = model.extend(cache, ids, lengths)
            calls.clear()
            return torch.tensor(M.generate(model, cache, logits, M.Sampling(9, 0.0), {-1})[1])
    log_probs()
    assert len(calls) == len(adapted) and all(linear.cast is None for linear in adapted)
    request.getfixturevalue("as_on_a_gpu")
    before = log_probs()
    with torch.no_grad():
        for linear in adapted:
            linear.lora_B.weight.normal_(std=0.3)
    after = log_probs()
    assert len(FakeGraph.made) == 1 and (before - after).abs().max() > 0.1
    monkeypatch.undo()
    assert (after[:, 0] - log_probs()[:, 0]).abs().max() < 0.05


def test_norms_of_half_precision_round_as_the_checkpoint_has_it():
    x, norm = torch.randn(5, 7, 64).bfloat16(), M.RMSNorm(64, 1e-5).bfloat16()
    norm.weight.data.normal_()
    by_hand = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16() * norm.weight
    assert torch.equal(norm(x), by_hand)


# ---- few shapes: lengths are rounded up on a GPU

def training_batch(model, tokenizer, shown):
    """Rows of three ragged prompts, two of them shared, with ragged answers; `shown`: each prompt has a picture."""
    image, rows, chosen = model.config.text.vocab_size, [], []
    for prompt, answers in ((7, (5, 9, 2)), (12, (4,)), (10, (8, 3))):
        text = ids_of(tokenizer, prompt, seed=prompt)
        text[1] = image if shown else text[1]
        for n in answers:
            rows.append(text + ids_of(tokenizer, n, seed=n))
            chosen.append([0] * prompt + [1] * n)
    context = pictures(model, 3) if shown else None
    if context:
        context.rows = torch.tensor([0, 0, 0, 1, 2, 2])
        context.arrange(context.rows, 3)
    return M.pad_rows(rows, tokenizer.pad, "cpu")[0], M.pad_rows(chosen, 0, "cpu")[0].bool(), context


@pytest.mark.parametrize("shown", [False, True], ids=["text", "pictures"])
@pytest.mark.parametrize("multiple", [4, 32])
def test_rounded_lengths_change_no_log_prob_and_no_gradient(model, tokenizer, shown, multiple, monkeypatch):
    found, shapes = [], []
    model.vision_model.requires_grad_(False), model.multi_modal_projector.requires_grad_(False)
    real = M.TextModel.forward
    monkeypatch.setattr(M.TextModel, "forward", lambda self, ids, *args, **how: shapes.append(ids.shape) or real(self, ids, *args, **how))
    for of in (1, multiple):
        monkeypatch.setitem(M.MULTIPLE, "cpu", of)
        for rows in (slice(None), slice(2, 5)):  # prompts that are shared and computed once; too little is shared
            with torch.no_grad():
                ids, chosen, context = training_batch(model, tokenizer, shown)
            model.zero_grad()
            image = context and context.select(torch.arange(6)[rows])
            log_probs = model.log_probs(ids[rows], chosen[rows], 0.7, image)
            (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
            found.append([log_probs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[2]) > 20 and ids.shape[1] % multiple == 0
    for plain, padded in zip(found[:2], found[2:]):
        for a, b in zip(plain, padded, strict=True):
            close(a, b, 1e-5 * max(1, a.abs().max().item()))
    assert all(width % multiple == 0 or width == ids.shape[1] - 1 for _, width in shapes[3:]), shapes


def test_rows_are_sampled_in_parts_as_together(model, tokenizer, monkeypatch):
    """A vocabulary of 128,256 takes 20 bytes a row and token while one is drawn."""
    want = played(model, tokenizer, ragged(tokenizer, 3), 5, 1.0)
    sizes, real = [], M.sample
    monkeypatch.setattr(M, "sample", lambda logits, *args: sizes.append(len(logits)) or real(logits, *args))
    monkeypatch.setattr(M, "AT_ONCE", 4 * model.config.text.vocab_size)
    assert played(model, tokenizer, ragged(tokenizer, 3), 5, 1.0) == want and set(sizes) == {3, 4}


def test_a_long_prompt_goes_through_the_mlp_in_parts(model, tokenizer, monkeypatch):
    rows = torch.tensor([ids_of(tokenizer, 12, seed=n) for n in range(5)])
    with torch.no_grad():
        want, sizes, real = model(rows), [], M.F.silu
        monkeypatch.setitem(M.MULTIPLE, "cpu", 4)
        monkeypatch.setattr(M, "AT_ONCE", 2 * 12 * model.config.text.hidden_size)
        monkeypatch.setattr(M.F, "silu", lambda x: sizes.append(len(x)) or real(x))
        close(model(rows), want)
    assert max(sizes) <= 2 and sum(sizes) == 5 * (model.config.text.num_hidden_layers - 1)  # text: no cross layer
    sizes.clear()
    model(rows)  # with gradients, which need all of it anyway
    assert set(sizes) == {5}

"""Your own lines as data of SFT, their held-out loss, the loss of DFT, and a model's own right answers as such lines."""
import json
import re

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import evaluate as E
import model as M
import tasks
import train_sft as S
from assets import keep

LINES = [{"prompt": "A 9 J 5, make 24", "response": "9"},
         {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "5"},
                       {"role": "user", "content": "No."}, {"role": "assistant", "content": "4"}]},
         {"prompt": "caf\u00e9\u2028 \U0001f0a1", "response": "\U0001f44b"}]


def write(path, lines=LINES):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def train(start, out, *flags, data=None):
    own = ["--data", str(data)] if data else []
    return S.main([*f"--init {start} --batch 4 --evals 2 --eval-n 4 --save-every 2 --device cpu --out {out}".split(), *own,
                   *" ".join(flags).split()])


def weights(run):
    return torch.cat([t.flatten() for t in M.load_model(E.find_model(str(run), "gp-l"))[0].state_dict().values()])


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_conversation_is_learned_in_its_responses_alone(tiny_run):
    _, tokenizer = M.load_model(E.find_model(str(tiny_run), "gp-l"))
    episode = S.conversation(tokenizer, ["What is 2 + 2?", "5", "No.", "4"], None)
    learned = [token for token, chosen in zip(episode.ids, episode.response_mask) if chosen]
    assert learned == [*tokenizer.encode("5"), tokenizer.eot, *tokenizer.encode("4"), tokenizer.eot]
    assert episode.ids == (tokenizer.prompt("What is 2 + 2?") + [*tokenizer.encode("5"), tokenizer.eot] + tokenizer.turn("No.")
                           + [*tokenizer.encode("4"), tokenizer.eot])


def test_lines_of_every_kind_are_read(tmp_path):
    found = S.read_conversations(str(write(tmp_path / "own.jsonl")), "gp-l")
    assert [texts for texts, *_ in found] == [["A 9 J 5, make 24", "9"], ["What is 2 + 2?", "5", "No.", "4"],
                                            ["caf\u00e9\u2028 \U0001f0a1", "\U0001f44b"]]
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "own.jsonl").read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert S.read_conversations(str(windows), "gp-l") == found


def test_other_tools_files_are_read(tmp_path):
    """TRL calls a response completion; `datasets` fills a line's missing columns with null."""
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    lines = [{"prompt": "a", "completion": "b", "messages": None, "image": None},
             {"prompt": None, "completion": None, "messages": [asked, answer]},
             {"prompt": [asked], "completion": [answer]}]
    assert S.read_conversations(str(write(tmp_path / "own.jsonl", lines)), "gp-l") == [(["a", "b"], None, "")] * 3
    with_system = {"prompt": [{"role": "system", "content": "s"}, asked, answer, asked], "completion": [answer]}
    assert S.read_conversations(str(write(tmp_path / "own.jsonl", [with_system])), "gp-l") == [(["a", "b"] * 2, None, "s")]


def test_a_file_that_is_one_array_is_told_in_plain_words(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(LINES))
    with pytest.raises(ValueError, match=r"own\.json, line 1: this is no object; a line is a JSON object"):
        S.read_conversations(str(tmp_path / "own.json"), "gp-l")


def test_the_words_of_the_system_stand_where_the_format_has_a_place(tmp_path, tokenizer):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    (conversation,) = S.read_conversations(str(write(tmp_path / "own.jsonl", [{"messages": messages}])), "gp-l")
    assert conversation == (["u", "a"], None, "s")
    tiny = S.conversation(tokenizer, *conversation)
    assert tiny.ids == tokenizer.prompt("s\n\nu") + [*tokenizer.encode("a"), tokenizer.eot]
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.train_from_iterator(["s u a"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[
        M.BOS, M.PAD, "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", M.EOT, M.IMAGE]))
    full = M.Tokenizer(bpe)
    assert not full.short and S.conversation(full, *conversation).ids == full.prompt("u", system="s") + [*full.encode("a"), full.eot]


BAD = ['{"prompt": "a"}', '{"prompt": "a", "response": 7}', '{"prompt": "a", "response": " "}', "[]", "7", "{", "\xff\xfe", '"a"', "null",
       '{"messages": [{"role": "assistant", "content": "a"}]}', '{"messages": [{"role": "user", "content": "a"}]}',
       '{"messages": [{"role": "user", "content": "b"}, {"role": "system", "content": "a"}, {"role": "assistant", "content": "c"}]}',
       '{"messages": [{"role": "system", "content": "b"}]}', '{"prompt": null, "completion": null}',
       '{"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "c"}]}', '{"messages": 7}',
       '{"messages": [7]}', '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', '{"prompt": "a", "response": "\\ud800"}', '{"prompt": "a", "response": "b", "image": "none.png"}',
       '{"prompt": "a", "response": "b", "image": 7}', "[" * 100_000]


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_by_its_number(line, tmp_path, tiny_run):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ")) as caught:
        train(tiny_run, tmp_path / "run", data=path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and not (tmp_path / "run").exists()


def test_a_file_without_lines_is_refused(tmp_path, tiny_run):
    (tmp_path / "own.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no line"):
        train(tiny_run, tmp_path / "run", data=tmp_path / "own.jsonl")
    with pytest.raises(ValueError, match="is no regular file"):
        train(tiny_run, tmp_path / "run", data=tmp_path)


def test_pictures_are_seen_where_the_task_shows_some(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    path = write(tmp_path / "own.jsonl", [{"prompt": "colour?", "response": "red", "image": "red.png"}] * 3)
    with pytest.raises(ValueError, match="line 1: .*--task gp-l shows no pictures"):
        S.read_conversations(str(path), "gp-l")
    (_, picture, _), *_ = S.read_conversations(str(path), "gp-vl")
    model, tokenizer = M.load_model(E.find_model("tiny", "gp-vl"))
    episode = S.conversation(tokenizer, ["colour?", "red"], picture)
    assert episode.ids[: len(tokenizer.prompt("colour?", image=True))] == tokenizer.prompt("colour?", image=True)
    assert episode.pictures[0].getpixel((0, 0)) == (255, 0, 0)
    sft = S.sft_backward(model, [episode, episode], tokenizer.pad, 8)
    assert sft["loss"] > 0 and model.vision_model.patch_embedding.weight.grad.abs().sum() > 0


def test_every_pass_has_every_line_once_in_another_order():
    data = S.OwnData([(["a", str(i)],) for i in range(40)], seed=3)
    orders = [S.shuffled(40, f"data/3/{number}") for number in range(3)]
    assert all(sorted(order) == list(range(40)) for order in orders) and orders[0] != orders[1] != orders[2]

    class Letters:
        """In place of a tokenizer."""
        eot = "end"
        encode = staticmethod(lambda text: [text])
        prompt = staticmethod(lambda text, image, system: [text])
        short = True
    seen = [data.episode(Letters, index).ids[1] for index in range(80)]
    assert seen == [str(i) for order in orders[:2] for i in order]


def test_a_run_on_own_lines_learns_them_and_resumes_bit_for_bit(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.jsonl"), write(tmp_path / "held.jsonl", LINES[:2])
    scores = train(tiny_run, "whole", "--steps 6 --lr 3e-3 --eval-data held.jsonl", data="own.jsonl")
    train(tiny_run, "part", "--steps 4 --lr 3e-3 --eval-data held.jsonl --schedule constant", data="own.jsonl")
    whole = logged(tmp_path / "whole")
    assert whole[-1]["loss"] < whole[0]["loss"] and scores["eval_loss"] == whole[-1]["eval_loss"]
    assert f"eval_loss {scores['eval_loss']:.3g}" in capsys.readouterr().out.replace("\n    ", " ")  # "0.00" says little
    train(tiny_run, "other", "--steps 6 --lr 3e-3 --eval-data held.jsonl --schedule constant", data="own.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    S.main(f"--resume {tmp_path / 'part'} --steps 6".split())
    assert torch.equal(weights(tmp_path / "part"), weights(tmp_path / "other"))
    model, tokenizer = M.load_model(E.find_model(str(tmp_path / "whole"), "gp-l"))
    total = tokens = 0
    for texts in (["A 9 J 5, make 24", "9"], ["What is 2 + 2?", "5", "No.", "4"]):
        episode = S.conversation(tokenizer, texts, None)
        with torch.no_grad():
            total -= model.log_probs(torch.tensor([episode.ids]), torch.tensor([episode.response_mask]).bool()).sum().item()
        tokens += sum(episode.response_mask)
    assert scores["eval_loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_run_does_not_go_on_with_other_lines(tiny_run, tmp_path):
    path = write(tmp_path / "own.jsonl")
    train(tiny_run, tmp_path / "run", "--steps 2", data=path)
    write(path, LINES[:2])
    for flags in (f"--resume {tmp_path / 'run'} --steps 4", None):
        with pytest.raises(ValueError, match="began with another --data or --eval-data"):
            if flags:
                S.main(flags.split())
            else:
                train(tiny_run, tmp_path / "run", "--steps 2 --or-resume", data=path)
    write(path)
    train(tiny_run, tmp_path / "run", "--steps 2 --or-resume", data=path)


@pytest.mark.parametrize("flags", ["--rules 10 11,12,13", "--demonstrators sorted", "--task gp-vl --model tiny --visuals red"])
def test_own_lines_take_the_place_of_demonstrators(flags, tmp_path, tiny_run):
    with pytest.raises(ValueError, match="--data takes the place"):
        S.main([*flags.split(), "--data", str(write(tmp_path / "own.jsonl")), "--out", str(tmp_path / "run")])


def test_a_run_of_an_earlier_version_goes_on(tiny_run, tmp_path):
    """Its args.json lacks the flags that came later; they are off."""
    train(tiny_run, tmp_path / "run", "--steps 2")
    for name in ("args.json", "start.json"):
        stored = json.loads((tmp_path / "run" / name).read_text())
        for key in (*S.NEWER, "data"):
            stored.pop(key, None)
        (tmp_path / "run" / name).write_text(json.dumps(stored))
    S.main(f"--resume {tmp_path / 'run'} --steps 4".split())
    assert len(logged(tmp_path / "run")) == 4


def test_dft_weighs_each_token_by_its_probability(model, tokenizer):
    """Its gradient is that of -p: of the probability itself, since p times the gradient of log p is the gradient of p."""
    episodes = [S.conversation(tokenizer, ["1 2 3 4", answer], None) for answer in ("1+2", "(3)")]
    found = S.sft_backward(model, episodes, tokenizer.pad, 1, kind="dft")
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = E.to_batch(episodes, tokenizer.pad, "cpu")
    p = model.log_probs(batch.ids, batch.chosen).exp()
    tokens = sum(episode.response_tokens for episode in episodes)
    (-p.sum() / tokens).backward()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, dict(model.named_parameters())[name].grad, atol=1e-6), name
    assert found["loss"] == pytest.approx((-p * p.log()).sum().item() / tokens, rel=1e-4)


def test_dft_is_a_flag(tiny_run, tmp_path):
    for loss in ("nll", "dft"):
        train(tiny_run, tmp_path / loss, f"--steps 1 --loss {loss}")
    assert logged(tmp_path / "dft")[0]["loss"] < logged(tmp_path / "nll")[0]["loss"]


# ---- Own right answers -----------------------------------------------------------------------------------------------

def kept(tmp_path, task, flags):
    path = tmp_path / "own" / f"{task}.jsonl"
    E_args = f"tiny --suite {task} --keep-correct {path} --device cpu {flags}"
    lines = keep.main(E_args.split())
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == lines
    return path, lines


def test_own_right_answers_are_right_and_of_the_training_problems(tmp_path, tiny_run, capsys):
    path, lines = kept(tmp_path, "gp-l", "--n 12 --k 3 --rule 11,12,13")
    problems = {problem.prompt: problem for problem in (
        tasks.make("gp-l", "11,12,13", split="train", index=i, style="short") for i in range(12))}
    for line in lines:
        assert tasks.make("gp-l", "11,12,13", split="train", index=[*problems].index(line["prompt"]),
                          style="short").step(line["response"]).outcome == "correct"
    said = capsys.readouterr().out
    assert f"{len(lines)} right answers of 36 to 12 train problems, rule 11,12,13" in said and 0 < len(lines) < 36
    train(tiny_run, tmp_path / "run", "--steps 1", data=path)
    with pytest.raises(ValueError, match="there already"):
        kept(tmp_path, "gp-l", "--n 2")


def test_walks_that_are_right_at_once_are_kept_with_all_their_turns(tmp_path):
    path, lines = kept(tmp_path, "virl-l", "--n 6 --k 2 --attempts 2")
    walks = {walk.prompt: walk for walk in (tasks.make("virl-l", split="train", index=i, style="short") for i in range(6))}
    for line in lines:
        texts = [message["content"] for message in line["messages"]]
        walk = walks[texts[0]].restarted()
        feedback = [walk.step(response).feedback for response in texts[1::2]]
        assert walk.verdict.outcome == "correct" and feedback[:-1] == texts[2::2]
    assert lines and [texts for texts, *_ in S.read_conversations(str(path), "virl-l")]


def test_own_right_answers_to_pictures_come_with_the_pictures(tmp_path):
    path, lines = kept(tmp_path, "gp-vl", "--n 6 --k 2")
    hands = [tasks.make("gp-vl", split="train", index=i, style="short") for i in range(6)]
    for (texts, picture, _), line in zip(S.read_conversations(str(path), "gp-vl"), lines):
        index = int(picture.stem)
        assert M.open_image(picture).tobytes() == hands[index].image.tobytes() and texts[0] == hands[index].prompt
    with pytest.raises(ValueError, match="several"):
        kept(tmp_path, "virl-vl", "--n 2")


def test_no_right_answer_leaves_no_file(tmp_path, tiny_run):
    with pytest.raises(ValueError, match="none of 4 answers is right"):
        keep.main(f"{tiny_run} --keep-correct {tmp_path / 'own.jsonl'} --n 4 --device cpu".split())
    assert not (tmp_path / "own.jsonl").exists()


def test_of_two_models_none_is_kept(tmp_path):
    with pytest.raises(ValueError, match="--keep-correct keeps the answers of one model"):
        keep.main(f"--compare tiny tiny --keep-correct {tmp_path / 'own.jsonl'} --n 1 --device cpu".split())

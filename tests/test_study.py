"""The table of a study with several sets: what its cells say is what the evaluations hold."""

import json

import numpy as np
import pytest

import fake_runs
from assets import study as studies


def with_nats(directory, **values):
    """Add nats to the evaluations of a run: {kind: (under ID, under rule OOD)}."""
    for path in directory.glob("evals/*.json"):
        evaluation = json.loads(path.read_text())
        evaluation["nats"] = {kind: dict(zip(("id", "rule"), [[value] * evaluation["n"] for value in pair])) for kind, pair in values.items()}
        path.write_text(json.dumps(evaluation))


def test_the_table_has_a_line_for_each_set(tmp_path, capsys):
    fake_runs.make(tmp_path / "a", n=60)
    fake_runs.make(tmp_path / "b", n=60, seeds=2, kind="tie")  # without nats
    fake_runs.make(tmp_path / "b-grid", n=60)  # a grid is no set
    (tmp_path / "c").mkdir()
    for run in (tmp_path / "a").iterdir():
        with_nats(run, teacher=(27.25, 31.5), moved=(3.0, 4.0) if run.name == "sft" else (0.5, 0.25))
    table = studies.main([str(tmp_path)])
    assert table.lines[0][0] == "a" and table.lines[1][0] == "b" and len(table.lines) == 2
    name, distance, *success, difference, moved, seeds = table.lines[0]
    assert (distance, moved, seeds) == ("27.2 / 31.5", "3.0 / 0.5", "1") and table.lines[1][1] == "– / –" and table.lines[1][-1] == "2"
    ends = {arm: json.loads(sorted((tmp_path / "a" / arm / "evals").glob("*.json"))[-1].read_text()) for arm in ("sft", "rl")}
    for arm, cell in zip(("sft", "rl"), success[1:]):
        means = [100 * np.mean(ends[arm]["rows"][row]["greedy"]["first"]) for row in ("id", "rule", "fake")]
        assert cell == " / ".join(f"{mean:.1f}" for mean in means)
    gap = [100 * np.mean(ends[arm]["rows"]["rule"]["greedy"]["first"]) for arm in ("sft", "rl")]
    assert difference.startswith(f"{gap[1] - gap[0]:+.1f} [") and table.lines[0][0] in capsys.readouterr().out


def test_a_set_that_is_not_finished_says_so(tmp_path):
    fake_runs.make(tmp_path / "a", n=60)
    args = tmp_path / "a" / "rl" / "args.json"
    args.write_text(json.dumps(json.loads(args.read_text()) | {"flops": 1e30}))
    assert studies.main([str(tmp_path)]).lines[0][0] == "a (not finished)"


@pytest.mark.parametrize("argv", [[], ["x", "--choose", "y"]])
def test_it_takes_one_of_two(argv):
    with pytest.raises(ValueError, match="give one of"):
        studies.main(argv)

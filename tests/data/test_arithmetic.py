import pytest
import torch

from p2k.core.seeding import generator
from p2k.data.arithmetic import EOS, PAD, SYMBOLS, TASKS, VOCAB_SIZE, decode, encode, make_arithmetic, reward

SMALL = [task for task in TASKS if task not in ("difference-2", "product-2", "factor-4")]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("3+4=", "7", 1),
        ("3+4=", "07", 0),
        ("3+4=", "7=", 0),
        ("3+4=", " 7", 0),
        ("3+4=", "", 0),
        ("3+4=", None, 0),
        ("3+4=", "3+4", 0),
        ("12-30=", "-18", 1),
        ("12-30=", "18", 0),
        ("30-30=", "0", 1),
        ("30-30=", "-0", 0),
        ("03*04=", "12", 1),
        ("00*04=", "0", 1),
        ("+12=", "5+7", 1),
        ("+12=", "0+12", 1),
        ("+12=", "12", 0),
        ("+12=", "5+07", 0),
        ("+12=", "5*7", 0),
        ("+12=", "5+6", 0),
        ("+12=", "-1+13", 0),
        ("*12=", "3*4", 1),
        ("*12=", "4*3", 1),
        ("*12=", "1*12", 0),
        ("*12=", "3+4", 0),
        ("*12=", "2*2*3", 0),
    ],
)
def test_verifier_edge_cases(prompt, completion, expected):
    assert reward(prompt, completion) == expected


@pytest.mark.parametrize("prompt", ["3+4", "=", "+=", "3/4=", "3+4=7"])
def test_verifier_refuses_prompts_it_does_not_know(prompt):
    with pytest.raises(ValueError, match="prompt must look like"):
        reward(prompt, "7")


@pytest.mark.parametrize("task", TASKS)
def test_split_is_disjoint_complete_and_free_of_mirrors(task):
    data = make_arithmetic(task, seed=3)
    train, held_out = set(data.train.tolist()), set(data.held_out.tolist())
    assert not train & held_out
    assert train | held_out == set(range(len(data.prompts)))
    assert len({tuple(prompt) for prompt in data.prompts.tolist()}) == len(data.prompts)
    if task.split("-")[0] in ("sum", "product"):
        mirrored = {tuple(sorted(_operands(data.text(problem)))) for problem in train}
        assert not mirrored & {tuple(sorted(_operands(data.text(problem)))) for problem in held_out}
    share = len(held_out) / len(data.prompts)
    assert 0.1 < share < 0.3


def _operands(text: str) -> list[int]:
    return [int(part) for part in text.rstrip("=").replace("*", "+").split("+")]


def test_split_depends_on_the_seed_only():
    first, again, other = (make_arithmetic("sum-1", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.held_out, other.held_out)


@pytest.mark.parametrize("task", SMALL)
def test_every_listed_answer_passes_the_verifier(task):
    data = make_arithmetic(task)
    for problem in torch.randperm(len(data.prompts), generator=generator(0))[:60].tolist():
        accepted = data.answers[problem, : data.counts[problem]].tolist()
        assert len({tuple(row) for row in accepted}) == len(accepted)
        assert all(reward(data.text(problem), decode(row)) == 1 for row in accepted)


@pytest.mark.parametrize("task", ["sum-1", "difference-1", "product-1", "split-1", "factor-2"])
def test_table_and_verifier_agree_on_random_completions(task):
    data, random = make_arithmetic(task), generator(1)
    problems = torch.randint(len(data.prompts), (4000,), generator=random)
    correct = data.sample_answers(problems, random)
    noise = torch.randint(VOCAB_SIZE, correct.shape, generator=random)
    # Half the rows are accepted answers with at most one token replaced, so that both verdicts occur often.
    edited = torch.rand(correct.shape, generator=random) < 0.1
    tokens = torch.where(edited, noise, correct)
    ended = (tokens == EOS).int().cumsum(1) - (tokens == EOS).int() > 0
    tokens = tokens.masked_fill(ended, PAD)
    expected = [
        reward(data.text(problem), decode(row)) for problem, row in zip(problems.tolist(), tokens.tolist(), strict=True)
    ]
    assert 0.3 < sum(expected) / 4000 < 0.95
    assert data.rewards(problems, tokens).tolist() == expected


def test_a_row_of_padding_is_worth_nothing():
    data = make_arithmetic("factor-2")
    problems = torch.arange(len(data.prompts))
    assert bool((data.counts < data.answers.shape[1]).any())
    assert not data.rewards(problems, torch.full((len(problems), data.completion_length), PAD)).any()


def test_a_completion_without_end_is_worth_nothing():
    data = make_arithmetic("sum-1")
    problem = next(row for row in range(100) if data.text(row) == "9+9=")
    good = torch.tensor([encode("18") + [EOS]])
    cut = torch.tensor([encode("180")])
    assert data.rewards(torch.tensor([problem]), good).item() == 1
    assert data.rewards(torch.tensor([problem]), cut).item() == 0
    assert decode(cut[0]) is None
    assert decode([1, PAD, EOS]) is None


def test_multi_answer_targets_cover_all_accepted_answers():
    data = make_arithmetic("split-1")
    problems = torch.full((2000,), 9)
    rows = data.sample_answers(problems, generator(2))
    counts = torch.unique(rows, dim=0, return_counts=True)[1]
    assert len(counts) == 10
    # Ten equally likely answers: five standard errors around 200 of 2000.
    assert int((counts - 200).abs().max()) < 5 * (2000 * 0.1 * 0.9) ** 0.5


def test_prompts_and_completions_use_the_vocabulary():
    assert len(SYMBOLS) == PAD == EOS - 1 == VOCAB_SIZE - 2
    data = make_arithmetic("difference-1")
    assert data.context == data.prompts.shape[1] + data.completion_length
    assert data.text(0) == "0-0="
    with pytest.raises(ValueError, match="only"):
        encode("3/4")


@pytest.mark.parametrize(("task", "share", "message"), [("sum-9", 0.2, "sum-1"), ("sum-1", 1.0, "held_out")])
def test_bad_input_is_named(task, share, message):
    with pytest.raises(ValueError, match=message):
        make_arithmetic(task, held_out=share)

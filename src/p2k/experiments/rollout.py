"""Rollouts with verifiable rewards: several completions per prompt, kept together as groups."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p2k.core.errors import P2KError
from p2k.data.arithmetic import EOS, PAD, ArithmeticData
from p2k.models.generation import Completions, generate
from p2k.models.gpt import GPT


@dataclass(frozen=True)
class Rollout:
    """Samples of a frozen policy; row ``b * num_generations + g`` is sample g of prompt b.

    Args:
        problems: number of each row's problem.
        prompts, tokens: ids.
        mask: True at sampled tokens, end token included.
        old_logps: log-probabilities at sampling time.
        rewards: one per row.
        sampled: completions drawn to fill this rollout, those thrown away included.
    """

    problems: Int[Tensor, " rows"]
    prompts: Int[Tensor, "rows prompt"]
    tokens: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length"]
    old_logps: Float[Tensor, "rows length"]
    rewards: Float[Tensor, " rows"]
    sampled: int

    def rows(self, rows: Tensor) -> "Rollout":
        """The given rows; callers keep groups whole."""
        parts = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Rollout(**parts, sampled=self.sampled)

    def minibatches(self, count: int, num_generations: int, random: torch.Generator) -> list[Int[Tensor, " rows"]]:
        """Row numbers of `count` parts of equal size, prompts in random order, every group whole.

        Raises:
            ValueError: the prompts do not divide evenly.
        """
        prompts = len(self.rewards) // num_generations
        if prompts % count:
            raise ValueError(f"Rollout: {prompts} prompts must split evenly into minibatches, got {count}")
        order = torch.randperm(prompts, generator=random, device=random.device)
        rows = order[:, None] * num_generations + torch.arange(num_generations, device=order.device)
        return [part.flatten() for part in rows.chunk(count)]


def sample_rollout(
    model: GPT,
    data: ArithmeticData,
    random: torch.Generator,
    *,
    prompts: int,
    num_generations: int,
    temperature: float = 1.0,
    resample: int = 0,
) -> Rollout:
    """Draw training problems without replacement, sample a group of completions for each and reward them.

    Args:
        model: the policy.
        data: problems and rewards.
        random: source of all randomness, on the model's device.
        prompts: groups in the result.
        num_generations: completions per prompt.
        temperature: of sampling, ``> 0``.
        resample: further draws to replace groups whose rewards are all equal (DAPO's dynamic sampling). What is still
            missing after them is filled with such groups.

    Raises:
        P2KError: more prompts than the task has training problems.
    """
    if prompts > len(data.train):
        raise P2KError(
            f"rollout: {data.name} has {len(data.train)} training problems, got prompts={prompts}: use fewer"
        )
    draws, informative = [], 0
    while len(draws) <= resample and informative < prompts:
        order = torch.rand(len(data.train), generator=random, device=random.device).argsort()
        problems = data.train[order[:prompts]].repeat_interleave(num_generations)
        sample = sample_completions(model, data, problems, random, temperature)
        rewards = data.rewards(problems, sample.tokens)
        if resample:
            groups = rewards.view(prompts, num_generations)
            informative += int((groups != groups[:, :1]).any(1).sum())
        draws.append((problems, sample, rewards))
    problems = torch.cat([draw[0] for draw in draws])
    rewards = torch.cat([draw[2] for draw in draws])
    rollout = Rollout(
        problems=problems,
        prompts=data.prompts[problems],
        tokens=torch.cat([draw[1].tokens for draw in draws]),
        mask=torch.cat([draw[1].mask for draw in draws]),
        old_logps=torch.cat([draw[1].logps for draw in draws]),
        rewards=rewards,
        sampled=len(rewards),
    )
    if len(draws) == 1:
        return rollout
    groups = rewards.view(-1, num_generations)
    flat = (groups == groups[:, :1]).all(1)
    kept = flat.int().argsort(stable=True)[:prompts]
    return rollout.rows((kept[:, None] * num_generations + torch.arange(num_generations, device=kept.device)).flatten())


def sample_completions(
    model: GPT, data: ArithmeticData, problems: Tensor, random: torch.Generator | None, temperature: float
) -> Completions:
    """One completion per row of `problems`; temperature 0 is greedy and needs no randomness."""
    options = {"eos": EOS, "pad": PAD, "generator": random, "temperature": temperature}
    return generate(model, data.prompts[problems], data.completion_length, **options)


@torch.no_grad()
def accuracy(model: GPT, data: ArithmeticData, problems: Int[Tensor, " problems"], *, batch: int = 2048) -> float:
    """Share of the problems that greedy decoding solves."""
    solved = [
        data.rewards(part, sample_completions(model, data, part, None, 0.0).tokens) for part in problems.split(batch)
    ]
    return torch.cat(solved).mean().item()


@torch.no_grad()
def diversity(
    model: GPT, data: ArithmeticData, problems: Int[Tensor, " problems"], random: torch.Generator, *, samples: int = 16
) -> dict[str, float]:
    """Sample several completions per problem: mean reward, share solved at least once, distinct correct answers.

    Args:
        model: the policy.
        data: problems and rewards.
        problems: to sample for.
        random: source of randomness.
        samples: completions per problem, k of pass@k.
    """
    rows = problems.repeat_interleave(samples)
    sample = sample_completions(model, data, rows, random, 1.0)
    correct = data.rewards(rows, sample.tokens).view(-1, samples).bool()
    # A completion as one number: base 16 digits, one per token.
    place = 16 ** torch.arange(sample.tokens.shape[1], device=rows.device)
    codes = (sample.tokens * place).sum(1).view(-1, samples).masked_fill(~correct, -1).sort(1).values
    fresh = torch.ones_like(correct)
    fresh[:, 1:] = codes[:, 1:] != codes[:, :-1]
    return {
        "pass@1": correct.float().mean().item(),
        f"pass@{samples}": correct.any(1).float().mean().item(),
        "distinct_correct": (fresh & (codes >= 0)).float().sum(1).mean().item(),
    }

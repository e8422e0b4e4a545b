"""Reinforcement learning with verifiable rewards: supervised start, group rollouts, several updates on each."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from p2k.core.checks import check_positive
from p2k.core.seeding import generator
from p2k.data.arithmetic import PAD, VOCAB_SIZE, ArithmeticData
from p2k.experiments.checkpoint import load_checkpoint, run_fingerprint, save_checkpoint
from p2k.experiments.rlvr_arms import Arm
from p2k.experiments.rollout import Rollout, accuracy, diversity, sample_rollout
from p2k.models.generation import completion_logps
from p2k.models.gpt import GPT, gpt_preset


@dataclass(frozen=True)
class RLVRConfig:
    """Settings of a run; every method of a comparison gets the same.

    Args:
        preset: sizes of the policy, see `p2k.models.gpt.GPT_PRESETS`.
        warm_steps, warm_batch, warm_learning_rate: of the supervised start.
        rollouts: sampling rounds.
        prompts: groups per rollout.
        num_generations: completions per prompt, ``>= 2``.
        num_iterations: passes over each rollout.
        minibatches: updates per pass; divides `prompts`, so that groups stay whole.
        learning_rate: of Adam, constant.
        temperature: of sampling, ``> 0``.
        max_grad_norm: gradients are scaled down to this norm.
        max_kl: a rollout whose updates move the policy further (k3 estimate per token, in nats) ends the run.
        patience, collapse_share: a mean reward over `patience` rollouts below this share of the best one ends the run.
        seed: of weights, warm start and rollouts.
    """

    preset: str = "cpu-tiny"
    warm_steps: int = 75
    warm_batch: int = 64
    warm_learning_rate: float = 3e-3
    rollouts: int = 40
    prompts: int = 32
    num_generations: int = 8
    num_iterations: int = 2
    minibatches: int = 2
    learning_rate: float = 1e-3
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    max_kl: float = 10.0
    patience: int = 10
    collapse_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what a run could not survive."""
        counts = {name: getattr(self, name) for name in ("rollouts", "prompts", "num_iterations", "minibatches")}
        check_positive("RLVRConfig", **counts, learning_rate=self.learning_rate, temperature=self.temperature)
        if self.num_generations < 2:
            raise ValueError(f"RLVRConfig: num_generations must be at least 2, got {self.num_generations}")
        if self.prompts % self.minibatches:
            raise ValueError(
                f"RLVRConfig: minibatches must divide prompts, so that groups stay whole, "
                f"got {self.minibatches} and {self.prompts}"
            )


@dataclass(frozen=True, eq=False)
class RLVRResult:
    """What a run leaves.

    Args:
        arm: name of the method.
        config: its settings.
        history: per rollout ``reward``, ``entropy``, ``kl``, ``grad_norm``, ``length``, ``sampled`` and the quantiles
            ``log_ratio/low`` and ``log_ratio/high`` (5 and 95 %) of the sequence log-ratios after the updates.
        train_accuracy, held_out_accuracy: greedy, after the run.
        sampled: `p2k.experiments.rollout.diversity` on (at most 512) training problems, after the run.
        stopped: ``""``, or the guard that ended the run: ``nan``, ``kl`` or ``collapse``.
        seconds: wall-clock time without the warm start.
        state: the final parameters (those before the failing rollout, where a guard stopped on ``nan``).
    """

    arm: str
    config: RLVRConfig
    history: Mapping[str, list[float]]
    train_accuracy: float
    held_out_accuracy: float
    sampled: Mapping[str, float]
    stopped: str
    seconds: float
    state: Mapping[str, Tensor] = field(repr=False)


def build_policy(data: ArithmeticData, preset: str, seed: int) -> GPT:
    """A fresh policy for a task, on the data's device; its weights hang on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(gpt_preset(preset, vocab_size=VOCAB_SIZE, context=data.context))
    return model.to(data.prompts.device)


def warm_start(data: ArithmeticData, config: RLVRConfig) -> GPT:
    """Supervised start on training problems with a random accepted answer each: a policy that is sometimes right."""
    model = build_policy(data, config.preset, config.seed)
    random = generator(config.seed, data.prompts.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.warm_learning_rate, fused=True)
    for _ in range(config.warm_steps):
        draw = torch.randint(len(data.train), (config.warm_batch,), generator=random, device=random.device)
        problems = data.train[draw]
        answers = data.sample_answers(problems, random)
        mask = answers != PAD
        logps, _ = completion_logps(model, data.prompts[problems], answers, mask)
        optimizer.zero_grad()
        (-logps.sum() / mask.sum()).backward()
        optimizer.step()
    return model


def train_policy(
    model: GPT,
    data: ArithmeticData,
    arm: Arm,
    config: RLVRConfig,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    progress: bool = False,
) -> RLVRResult:
    """Train `model` in place by one method.

    Args:
        model: the start, from `warm_start`.
        data: task, on the model's device.
        arm: the method, see `p2k.experiments.rlvr_arms.ARMS`.
        config: settings.
        checkpoint: file to write while training, and to resume from if it exists: bit for bit as if never stopped.
        checkpoint_every: rollouts between writes.
        progress: show a bar.

    Raises:
        P2KError: the checkpoint is damaged or belongs to another run, or the task has too few problems.
    """
    began = time.perf_counter()
    random = generator(config.seed + 1_000_003, data.prompts.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    fingerprint = run_fingerprint(model, {"arm": arm.name, "task": data.name, **asdict(config)})
    history, stopped = {}, ""
    if checkpoint is not None and checkpoint.exists():
        saved = load_checkpoint(checkpoint, model, optimizer, fingerprint=fingerprint)
        history, stopped = saved["history"], saved["stopped"]
        random.set_state(saved["random"])
    start = len(history.get("reward", ()))
    with tqdm(total=config.rollouts, initial=start, disable=not progress, desc=arm.name) as bar:
        for number in range(start, config.rollouts):
            if stopped:
                break
            before = _copy(model)
            for name, value in _improve(model, data, arm, config, optimizer, random).items():
                history.setdefault(name, []).append(value)
            stopped = guard(history, config)
            if stopped == "nan":
                model.load_state_dict(before)
            if checkpoint is not None and (stopped or (number + 1) % checkpoint_every == 0):
                state = {"history": history, "stopped": stopped, "random": random.get_state()}
                save_checkpoint(checkpoint, model, optimizer, fingerprint=fingerprint, progress=state)
            bar.update()
            bar.set_postfix(reward=f"{history['reward'][-1]:.2f}")
    return RLVRResult(
        arm=arm.name,
        config=config,
        history=history,
        train_accuracy=accuracy(model, data, data.train),
        held_out_accuracy=accuracy(model, data, data.held_out),
        sampled=diversity(model, data, data.train[:512], generator(config.seed + 2_000_003, data.prompts.device)),
        stopped=stopped,
        seconds=time.perf_counter() - began,
        state=_copy(model),
    )


def guard(history: Mapping[str, list[float]], config: RLVRConfig) -> str:
    """Why a run must end now: ``nan``, ``kl``, ``collapse``, or ``""`` to go on."""
    norm, kl = torch.tensor([history["grad_norm"][-1], history["kl"][-1]], dtype=torch.float64)
    if not (norm.isfinite() and kl.isfinite()):
        return "nan"
    if kl > config.max_kl:
        return "kl"
    rewards = torch.tensor(history["reward"], dtype=torch.float64)
    if len(rewards) <= config.patience:
        return ""
    means = rewards.unfold(0, config.patience, 1).mean(1)
    return "collapse" if means[-1] < config.collapse_share * means.max() else ""


def _improve(
    model: GPT,
    data: ArithmeticData,
    arm: Arm,
    config: RLVRConfig,
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
) -> dict[str, float]:
    """One rollout and the updates on it; the host reads the metrics once, at the end."""
    size = config.num_generations
    options = {"prompts": config.prompts, "num_generations": size, "temperature": config.temperature}
    rollout = sample_rollout(model, data, random, resample=arm.resample, **options)
    advantages = arm.advantages(rollout, size)
    metrics: list[dict[str, Tensor]] = []
    parameters = list(model.parameters())
    for iteration in range(config.num_iterations):
        for rows in rollout.minibatches(config.minibatches, size, random):
            part = rollout.rows(rows)
            logps, entropy = completion_logps(
                model, part.prompts, part.tokens, part.mask, temperature=config.temperature
            )
            loss, own = arm.loss(logps, part, advantages[rows], size)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            last = iteration + 1 == config.num_iterations
            metrics.append(_watch(logps.detach(), entropy, part, norm, last) | {f"loss/{k}": v for k, v in own.items()})
    names = {name for row in metrics for name in row}
    means = {name: torch.stack([row[name].float() for row in metrics if name in row]).mean() for name in sorted(names)}
    means["reward"] = rollout.rewards.mean()
    means["length"] = rollout.mask.sum(1).float().mean()
    return {"sampled": float(rollout.sampled)} | {name: value.item() for name, value in means.items()}


def _watch(logps: Tensor, entropy: Tensor, part: Rollout, norm: Tensor, last: bool) -> dict[str, Tensor]:
    """Detached metrics of a minibatch; distances to the old policy on the last pass only, where they are largest."""
    tokens = part.mask.sum()
    found = {"grad_norm": norm.detach(), "entropy": entropy.sum() / tokens}
    if last:
        difference = logps - part.old_logps
        sequence = difference.sum(1)
        found["kl"] = (torch.expm1(difference) - difference).sum() / tokens
        found["log_ratio/low"], found["log_ratio/high"] = torch.quantile(sequence, sequence.new_tensor([0.05, 0.95]))
    return found


def _copy(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

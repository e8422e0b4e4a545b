"""Preference learning on the noisy bandits: every method, all scenarios and seeds at once.

An environment is a scenario with a seed. Policies of all environments are one stack of small MLPs, trained by batched
matrix products; their losses are summed, so no environment's gradient depends on another. Contexts, items and
corrupted rewards are the same for every method.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.core.seeding import generator
from p2k.data.preferences import CONTEXT, ITEMS, PreferenceData
from p2k.losses.adpo import adpo_loss
from p2k.losses.anchors import build_anchor
from p2k.losses.dpo import dpo_loss
from p2k.losses.listwise import all_pairs_loss
from p2k.losses.targets import kde_target, softmax_target

Parameters = Mapping[str, Tensor]
LEARNING_RATE = 5e-3


def initial_parameters(seeds: Sequence[int], width: int) -> dict[str, Tensor]:
    """One MLP 16 -> width -> width -> 8 per seed, stacked; torch's default scale, the output layer a tenth of it."""
    sizes = (CONTEXT, width, width, ITEMS)
    stacks: dict[str, list[Tensor]] = {}
    for seed in seeds:
        random = generator(seed + 2_000_003)
        for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            scale = (0.1 if layer == 2 else 1.0) * fan_in**-0.5
            for kind, rows in (("weight", fan_in), ("bias", 1)):
                values = scale * (2 * torch.rand(rows, fan_out, generator=random) - 1)
                stacks.setdefault(f"{layer}.{kind}", []).append(values)
    return {name: torch.stack(values) for name, values in stacks.items()}


def item_log_probs(
    parameters: Parameters, contexts: Float[Tensor, "environments batch context"]
) -> Float[Tensor, "environments batch items"]:
    """Log-probability of every item under each environment's policy."""
    hidden = torch.baddbmm(parameters["0.bias"], contexts, parameters["0.weight"]).relu()
    hidden = torch.baddbmm(parameters["1.bias"], hidden, parameters["1.weight"]).relu()
    return torch.baddbmm(parameters["2.bias"], hidden, parameters["2.weight"]).log_softmax(-1)


# A method's loss: (logps, anchor logps, rewards; settings), tensors [environments, batch, candidates], to one loss per
# list, [environments, batch].


def one_pair(logps: Tensor, anchor: Tensor, rewards: Tensor, *, tau: float) -> Tensor:
    """DPO on the first two candidates only; items stand in random order, so this is a random pair."""
    return all_pairs_loss(logps[..., :2], anchor[..., :2], rewards[..., :2], beta=1 / tau, reduction="none")[0]


def all_pairs(logps: Tensor, anchor: Tensor, rewards: Tensor, *, tau: float) -> Tensor:
    """DPO on every pair of the list: the baseline that sees as much as a list-wise loss."""
    return all_pairs_loss(logps, anchor, rewards, beta=1 / tau, reduction="none")[0]


def _pairs(values: Tensor) -> Tensor:
    """The two members of each of the P (P - 1) / 2 pairs of a list, ``[..., pairs, 2]``."""
    places = torch.combinations(torch.arange(values.shape[-1], device=values.device))
    return values[..., places]


def robust_pairs(logps: Tensor, anchor: Tensor, rewards: Tensor, *, tau: float, flip: float) -> Tensor:
    """Robust DPO on every pair, corrected for labels flipped with probability `flip`."""
    pairs, anchors, values = _pairs(logps), _pairs(anchor), _pairs(rewards)
    order = values.argsort(-1, descending=True)
    chosen, rejected = pairs.gather(-1, order).unbind(-1)
    anchor_chosen, anchor_rejected = anchors.gather(-1, order).unbind(-1)
    options = {"loss_type": "robust", "label_smoothing": flip, "beta": 1 / tau, "reduction": "none"}
    return dpo_loss(chosen, rejected, anchor_chosen, anchor_rejected, **options)[0].mean(-1)


def soft_pairs(logps: Tensor, anchor: Tensor, rewards: Tensor, *, tau: float, beta_reward: float) -> Tensor:
    """Every pair with a Bradley-Terry label from the difference of its rewards."""
    target = softmax_target(_pairs(rewards), beta_reward=beta_reward)
    return adpo_loss(_pairs(logps), _pairs(anchor), target, tau=tau, reduction="none")[0].mean(-1)


def list_raw(logps: Tensor, anchor: Tensor, rewards: Tensor, *, tau: float, beta_reward: float) -> Tensor:
    """The whole list against the Boltzmann distribution of its rewards."""
    return adpo_loss(logps, anchor, softmax_target(rewards, beta_reward=beta_reward), tau=tau, reduction="none")[0]


def list_kde(logps: Tensor, anchor: Tensor, rewards: Tensor, *, tau: float, beta_reward: float) -> Tensor:
    """The whole list against the Boltzmann distribution of its rewards' smoothed ranks."""
    return adpo_loss(logps, anchor, kde_target(rewards, beta_reward=beta_reward), tau=tau, reduction="none")[0]


@dataclass(frozen=True)
class Method:
    """A way to learn from preferences, and the settings it may be tuned over: the same number for every method.

    Args:
        name: for tables.
        feedback: the loss of each list.
        settings: keyword arguments of `feedback` to choose from; `learning_rate`, if there, is AdamW's instead.
        anchor: name and options of `p2k.losses.anchors.build_anchor`; the anchored kinds start at the reference.
    """

    name: str
    feedback: Callable[..., Tensor]
    settings: tuple[dict[str, float], ...]
    anchor: str = "fixed"
    anchor_options: Mapping[str, float] = field(default_factory=dict)


_TAU = tuple({"tau": tau} for tau in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
_FLIP = tuple({"tau": tau, "flip": flip} for tau in (1.0, 2.0, 4.0, 8.0) for flip in (0.1, 0.2))
_REWARD = tuple({"tau": tau, "beta_reward": beta} for tau in (1.0, 2.0, 4.0, 8.0) for beta in (0.3, 1.0))
METHODS = (
    Method("dpo-one-pair", one_pair, _TAU),
    Method("dpo-all-pairs", all_pairs, _TAU),
    Method("robust-pairs", robust_pairs, _FLIP),
    Method("soft-pairs", soft_pairs, _REWARD),
    Method("list-raw", list_raw, _REWARD),
    Method("list-kde", list_kde, _REWARD),
    Method("list-raw-uniform", list_raw, _REWARD, "uniform"),
    Method("list-raw-dynamic", list_raw, _REWARD, "dynamic", {"every": 20}),
    Method("list-raw-ema", list_raw, _REWARD, "ema", {"decay": 0.99}),
)


def train_reference(
    data: PreferenceData, *, width: int = 32, learning_rate: float = LEARNING_RATE
) -> dict[str, Tensor]:
    """The policies that all methods start from: cross-entropy to the best item on clean data."""
    initial = initial_parameters(data.seeds, width)
    parameters = _trainable({name: tensor.to(data.contexts) for name, tensor in initial.items()})
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, fused=True)
    for contexts, best in zip(data.warm_contexts, data.warm_best, strict=True):
        chosen = item_log_probs(parameters, contexts).gather(-1, best[..., None])
        # Sums over environments keep their gradients apart.
        _step(optimizer, -chosen.mean((1, 2)).sum())
    return {name: tensor.detach() for name, tensor in parameters.items()}


def train(data: PreferenceData, start: Parameters, method: Method, setting: Mapping[str, float]) -> dict[str, Tensor]:
    """Train copies of the policies `start` by one method with one setting, on all environments at once."""
    options = dict(setting)
    learning_rate = options.pop("learning_rate", LEARNING_RATE)
    parameters = _trainable(start)
    kept = method.anchor not in ("uniform", "on_policy")
    anchor = build_anchor(method.anchor, start if kept else None, **method.anchor_options)
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, fused=True)
    for contexts, items, rewards in zip(data.contexts, data.items, data.rewards, strict=True):
        logps = item_log_probs(parameters, contexts).gather(-1, items)
        reference = anchor.reference(logps, lambda other, x=contexts, i=items: item_log_probs(other, x).gather(-1, i))
        _step(optimizer, method.feedback(logps, reference, rewards, **options).mean(-1).sum())
        anchor.step(parameters)
    return {name: tensor.detach() for name, tensor in parameters.items()}


@torch.no_grad()
def evaluate(data: PreferenceData, parameters: Parameters) -> dict[str, Float[Tensor, " environments"]]:
    """Mean over clean contexts of the probability of the best item, of how often it leads, and of the regret.

    The regret is the best item's clean reward minus the expected clean reward under the policy.
    """
    policy = item_log_probs(parameters, data.test_contexts).exp()
    best = data.test_rewards.argmax(-1, keepdim=True)
    highest = data.test_rewards.gather(-1, best).squeeze(-1)
    return {
        "win_mass": policy.gather(-1, best).mean((1, 2)),
        "top1": (policy.argmax(-1, keepdim=True) == best).float().mean((1, 2)),
        "regret": (highest - (policy * data.test_rewards).sum(-1)).mean(1),
    }


def _trainable(parameters: Parameters) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

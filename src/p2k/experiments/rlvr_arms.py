"""What is compared in the RLVR loop: a recipe of advantage and loss, with what the task must tell it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.data.arithmetic import VOCAB_SIZE
from p2k.experiments.rollout import Rollout
from p2k.losses.recipes import RECIPES, Recipe
from p2k.losses.schedules import confidence, guarded_alpha, improvement

# (mean log-probability per token, advantage), both [groups, samples] -> options for this minibatch
Schedule = Callable[[Tensor, Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class Arm:
    """A method as the loop runs it.

    Args:
        name: for tables.
        recipe: advantage estimator, loss and aggregation, from `p2k.losses.recipes`.
        needs: what the loss must be told about the batch: ``num_generations`` or ``loss_scale_factor``.
        resample: extra draws to replace groups with equal rewards (DAPO's dynamic sampling).
        schedule: sets options of each minibatch from its statistics, without gradient.
    """

    name: str
    recipe: Recipe
    needs: tuple[str, ...] = ()
    resample: int = 0
    schedule: Schedule | None = field(default=None)

    def but(self, name: str, **loss_options: Any) -> "Arm":
        """The same method under another name with some options of its loss changed."""
        merged = {**self.recipe.loss_options, **loss_options}
        return replace(self, name=name, recipe=replace(self.recipe, loss_options=merged))

    def advantages(self, rollout: Rollout, num_generations: int) -> Float[Tensor, "rows length"]:
        """Advantage of every token. The reward stands on the first token: estimators sum a row's rewards."""
        rewards = torch.zeros_like(rollout.old_logps)
        rewards[:, 0] = rollout.rewards
        index = torch.arange(len(rewards), device=rewards.device) // num_generations
        options = dict(self.recipe.advantage_options) or None
        return self.recipe.estimator(rewards, rollout.mask, index=index, config=options)[0]

    def loss(
        self, logps: Float[Tensor, "rows length"], part: Rollout, advantages: Tensor, num_generations: int
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Policy loss of one minibatch of whole groups."""
        task = {"num_generations": num_generations, "loss_scale_factor": float(part.tokens.numel())}
        options = {**self.recipe.loss_options, **{name: task[name] for name in self.needs}}
        if self.schedule is not None:
            mean, shape = logps.detach().sum(1) / part.mask.sum(1), (-1, num_generations)
            options.update(self.schedule(mean.view(shape), advantages[:, 0].view(shape)))
        loss = self.recipe.policy_loss
        return loss(part.old_logps, logps, advantages, part.mask, self.recipe.loss_agg_mode, config=options or None)


def guarded(mean_logps: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Alpha of APO lowered while the policy is sure and the rewards are good."""
    certainty = confidence(mean_logps, math.log(VOCAB_SIZE))
    return {"alpha": guarded_alpha(certainty, improvement(advantages))}


def guarded_by_group(mean_logps: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """One alpha per group: what `guarded` gives where a micro-batch holds a single prompt.

    Over several groups the mean of centred advantages is 0, and `guarded` reads nothing but their two extremes.
    """
    certainty = torch.vmap(lambda group: confidence(group, math.log(VOCAB_SIZE)))(mean_logps)
    return {"alpha": guarded_alpha(certainty, torch.vmap(improvement)(advantages)).unsqueeze(-1)}


def _arms() -> dict[str, Arm]:
    """The published recipes with the clip range that short answers need, and the dials of ours."""
    group = ("num_generations",)
    arms = [Arm(name, RECIPES[name]) for name in ("reinforce", "rloo", "grpo")]
    arms.append(Arm("dr_grpo", RECIPES["dr_grpo"], ("loss_scale_factor",)))
    arms.append(Arm("dapo", RECIPES["dapo"], resample=2))
    # The paper's 3e-4 belongs to answers of thousands of tokens: with three, every update would be clipped.
    arms.append(Arm("gspo", RECIPES["gspo"]).but("gspo", clip_ratio_low=0.2, clip_ratio_high=0.2))
    arms.append(Arm("dpo", RECIPES["dpo"], group))
    arms.append(Arm("adpo", RECIPES["adpo"], group))
    apo = Arm("apo", RECIPES["apo"], group)
    arms += [apo.but("apo", alpha=0.9), apo.but("apo-0.35", alpha=0.35), apo.but("apo-0.6", alpha=0.6)]
    arms.append(replace(apo, name="apo-guarded", schedule=guarded))
    arms.append(replace(apo, name="apo-guarded-group", schedule=guarded_by_group))
    gopo = Arm("gopo", RECIPES["gopo"], group)
    arms += [gopo, gopo.but("gopo-1", mu=1.0), gopo.but("gopo-2", mu=2.0)]
    return {arm.name: arm for arm in arms}


ARMS = _arms()
# The nine of the map of relatives; ``dpo`` takes every pair of a group with different rewards.
MAP_ARMS = ("rloo", "grpo", "dr_grpo", "dapo", "gspo", "dpo", "adpo", "apo", "gopo")

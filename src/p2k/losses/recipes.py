"""Which advantage, loss and mean make up a published method: the map of relatives as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Entering the losses in the registry is a side effect of importing the files that define them.
from p2k.losses import advantages, group_policy, online_dpo, policy  # noqa: F401
from p2k.losses.registry import AdvantageEstimator, PolicyLoss, get_adv_estimator, get_policy_loss


@dataclass(frozen=True)
class Recipe:
    """A method as the parts that the registries name; options are those of the parts."""

    advantage: str
    loss: str
    loss_agg_mode: str
    advantage_options: Mapping[str, Any] = field(default_factory=dict)
    loss_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def estimator(self) -> AdvantageEstimator:
        """The advantage estimator."""
        return get_adv_estimator(self.advantage)

    @property
    def policy_loss(self) -> PolicyLoss:
        """The policy loss."""
        return get_policy_loss(self.loss)


# Dr.GRPO's constant and the group size of the list losses belong to the task, so the caller adds them to the options.
RECIPES: dict[str, Recipe] = {
    "reinforce": Recipe("rloo", "gpg", "seq-mean-token-sum"),
    "rloo": Recipe("rloo", "vanilla", "seq-mean-token-sum"),
    "grpo": Recipe("grpo", "vanilla", "seq-mean-token-mean"),
    "dr_grpo": Recipe("dr_grpo", "vanilla", "seq-mean-token-sum-norm"),
    "dapo": Recipe("grpo", "vanilla", "token-mean", loss_options={"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "gspo": Recipe(
        "grpo", "gspo", "seq-mean-token-mean", loss_options={"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
    ),
    "dpo": Recipe("dr_grpo", "online_dpo", "seq-mean-token-mean"),
    "adpo": Recipe("grpo", "adpo", "seq-mean-token-mean"),
    "apo": Recipe("dr_grpo", "apo", "seq-mean-token-mean"),
    "gopo": Recipe("dr_grpo", "gopo", "seq-mean-token-mean"),
}

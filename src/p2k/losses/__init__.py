"""Floor 2: functional losses with module twins."""

from p2k.losses.adpo import ADPOLoss, adpo_loss, decoupled_adpo_loss
from p2k.losses.anchors import ANCHORS, build_anchor
from p2k.losses.apo import APOLoss, apo_loss
from p2k.losses.cut_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from p2k.losses.dpo import DPOLoss, dpo_loss
from p2k.losses.gopo import GOPOLoss, gopo_loss, linear_gopo_loss, water_fill
from p2k.losses.listwise import all_pairs_loss, plackett_luce_loss
from p2k.losses.recipes import RECIPES
from p2k.losses.registry import get_adv_estimator, get_policy_loss, register_adv_est, register_policy_loss
from p2k.losses.stablemax import StableMaxCrossEntropyLoss, rest_cross_entropy, stablemax_cross_entropy
from p2k.losses.z_loss import ZLoss

__all__ = [
    "ANCHORS",
    "RECIPES",
    "ADPOLoss",
    "APOLoss",
    "DPOLoss",
    "GOPOLoss",
    "LinearCrossEntropyLoss",
    "StableMaxCrossEntropyLoss",
    "ZLoss",
    "adpo_loss",
    "all_pairs_loss",
    "apo_loss",
    "build_anchor",
    "decoupled_adpo_loss",
    "dpo_loss",
    "get_adv_estimator",
    "get_policy_loss",
    "gopo_loss",
    "linear_cross_entropy",
    "linear_gopo_loss",
    "plackett_luce_loss",
    "register_adv_est",
    "register_policy_loss",
    "rest_cross_entropy",
    "stablemax_cross_entropy",
    "water_fill",
]

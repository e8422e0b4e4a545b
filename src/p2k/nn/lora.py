"""Low-rank adapters on linear layers, with PEFT's names: W x + scaling * B A x, the base weight frozen.

Chapter: inflection
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclasses.dataclass
class LoraConfig:
    """Which layers get an adapter and of what size; the fields and defaults of `peft.LoraConfig`.

    Args:
        r: rank of the adapters, ``>= 1``.
        target_modules: names or endings of names of linear layers, or one regular expression that must match the
            whole name.
        lora_alpha: the adapter's output is multiplied by ``lora_alpha / r``.
        lora_dropout: dropout on the adapter's input, in 0..1.
        use_rslora: divide by ``sqrt(r)`` instead of r.
        init_lora_weights: True for Kaiming-uniform A, ``"gaussian"`` for normal A with deviation ``1 / r``; B is zero
            in both. False leaves B at random: the adapter then changes the model at once.
        layers_to_transform: indices of the layers to adapt; None means all.
        layers_pattern: name of the list of layers in front of the index; None means any that is not the first part
            of a name.
        rank_pattern: ending of a name, as a regular expression -> its own r.
        alpha_pattern: ending of a name, as a regular expression -> its own lora_alpha.
        exclude_modules: like `target_modules`, for layers to leave alone.
        modules_to_save: names of modules trained whole and saved with the adapter, a classifier head for instance.
        bias: only ``"none"``: biases stay frozen.
        fan_in_fan_out: only False.
        lora_bias: only False.
        use_dora: only False.
        target_parameters: only None.
        inference_mode: load frozen.
        task_type: kept for PEFT, not used here.
        base_model_name_or_path: kept for PEFT, not used here.

    Raises:
        ValueError: a number is out of range, or an option is not supported.

    Source: hu2021lora, eq:inflection-lora.
    Chapter: inflection
    """

    r: int = 8
    target_modules: Sequence[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    target_parameters: Sequence[str] | None = None
    inference_mode: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would otherwise be ignored."""
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"LoraConfig: the rank of {name} must be >= 1, got {rank}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoraConfig: lora_dropout must lie in 0..1, got {self.lora_dropout}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"LoraConfig: init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}"
            )
        supported = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "use_dora": False}
        for name, value in {**supported, "target_parameters": None}.items():
            if getattr(self, name) not in (value, []):
                raise ValueError(f"LoraConfig: {name} must be {value!r}, got {getattr(self, name)!r}")


class LoraLinear(nn.Module):
    """A frozen linear layer with any number of named low-rank adapters, of which the active ones are added.

    Args:
        base_layer: the layer to adapt; its parameters are frozen.

    Source: hu2021lora, eq:inflection-lora.
    Chapter: inflection
    """

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.r, self.lora_alpha, self.scaling = {}, {}, {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []

    def get_base_layer(self) -> nn.Linear:
        """The layer as it was before any adapter."""
        return self.base_layer

    def update_layer(self, adapter: str, config: LoraConfig, *, r: int, lora_alpha: float) -> None:
        """Add an adapter of rank `r`, in the dtype and on the device of the base layer, and make it active."""
        if adapter in self.lora_A:
            raise ValueError(f"LoraLinear: adapter {adapter!r} exists already; delete it first")
        weight = self.base_layer.weight
        like = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.lora_A[adapter] = nn.Linear(self.base_layer.in_features, r, **like)
        self.lora_B[adapter] = nn.Linear(r, self.base_layer.out_features, **like)
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.r[adapter], self.lora_alpha[adapter] = r, lora_alpha
        self.scaling[adapter] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A[adapter].weight, std=1 / r)
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_B[adapter].weight)
        self.set_adapter(adapter)

    def set_adapter(self, adapters: str | Sequence[str]) -> None:
        """Make these adapters the active, trainable ones; an empty list switches all off."""
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        for name in names:
            self._check(name)
        self.active_adapters = names
        for part in (self.lora_A, self.lora_B):
            for name, module in part.items():
                module.requires_grad_(name in names)

    def delete_adapter(self, adapter: str) -> None:
        """Remove an adapter; a merged one is taken out of the weight first."""
        self._check(adapter)
        if adapter in self.merged_adapters:
            self._add(adapter, -1)
            self.merged_adapters.remove(adapter)
        for part in (self.lora_A, self.lora_B, self.lora_dropout, self.r, self.lora_alpha, self.scaling):
            del part[adapter]
        self.active_adapters = [name for name in self.active_adapters if name != adapter]

    def get_delta_weight(self, adapter: str) -> Float[Tensor, "out_features in_features"]:
        """The adapter as a change of the base weight, ``scaling * B A``, computed in float32 or wider."""
        self._check(adapter)
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        wide = torch.promote_types(down.dtype, torch.float32)
        return self.scaling[adapter] * (up.to(wide) @ down.to(wide))

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add adapters to the base weight, so that the forward pass costs nothing extra.

        Args:
            safe_merge: first check that every new weight is finite.
            adapter_names: which ones; None means the active ones. Those merged already stay merged once.

        Raises:
            ValueError: `safe_merge` found a weight that is not finite; the layer is unchanged.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name not in self.merged_adapters]
        if safe_merge:
            merged = self.base_layer.weight + sum((self.get_delta_weight(name) for name in names), torch.zeros(()))
            if not merged.isfinite().all():
                raise ValueError(f"LoraLinear: merging {names} gives weights that are not finite; nothing was changed")
        for name in names:
            self._add(name, 1)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again; half precision leaves a rounding error behind."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Base layer plus the active adapters that are not merged.

        Raises:
            RuntimeError: other adapters are merged than are active: the result would be a mixture.
        """
        if self.merged_adapters:
            if set(self.merged_adapters) != set(self.active_adapters):
                merged, active = self.merged_adapters, self.active_adapters
                raise RuntimeError(f"LoraLinear: {merged} are merged but {active} are active; unmerge first")
            return self.base_layer(x)
        out = self.base_layer(x)
        for name in self.active_adapters:
            out = out + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return out

    def _check(self, adapter: str) -> None:
        if adapter not in self.lora_A:
            raise ValueError(f"LoraLinear: no adapter {adapter!r}; there are {sorted(self.lora_A)}")

    @torch.no_grad()
    def _add(self, adapter: str, sign: int) -> None:
        """Add or subtract an adapter, rounding once."""
        weight = self.base_layer.weight
        delta = self.get_delta_weight(adapter)
        weight.copy_((weight.to(delta.dtype) + sign * delta).to(weight.dtype))


class ModulesToSave(nn.Module):
    """A module that is trained whole, one copy per adapter; without an active copy the original runs."""

    def __init__(self, original_module: nn.Module):
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []

    def get_base_layer(self) -> nn.Module:
        """The module as it was before any adapter."""
        return self.original_module

    def set_adapter(self, adapters: str | Sequence[str]) -> None:
        """Run and train the copy of this adapter; copies cannot be added up, so at most one may be active."""
        names = [
            name for name in ([adapters] if isinstance(adapters, str) else adapters) if name in self.modules_to_save
        ]
        if len(names) > 1:
            raise ValueError(f"ModulesToSave: one copy can be active, got {names}")
        self.active_adapters = names
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in names)

    def forward(self, *args, **kwargs):
        """The active copy, or the original."""
        active = self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module
        return active(*args, **kwargs)

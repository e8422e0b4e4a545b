"""Adapters of a whole model: put them in, switch them, merge them, and keep them in PEFT's two files.

Chapter: inflection
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from p2k.core.checks import require
from p2k.core.errors import P2KError
from p2k.core.files import write_atomic, write_atomically
from p2k.nn.lora import LoraConfig, LoraLinear, ModulesToSave

# PEFT's wrapper puts the model two attributes deep; the names in its files carry that path.
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def inject_adapter_in_model(config: LoraConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Freeze a model and put adapters on the layers that `config` names; the model is changed in place and returned.

    Args:
        config: what to adapt and how.
        model: any module tree; its matching linear layers become `LoraLinear`.
        adapter_name: name under which the adapter is switched, merged and saved.

    Raises:
        ValueError: no layer matches, a matching layer is not linear, or the name is taken.

    Source: hu2021lora, eq:inflection-lora.
    Chapter: inflection
    """
    op = "inject_adapter_in_model"
    configs = model.__dict__.setdefault("peft_config", {})
    if adapter_name in configs:
        raise ValueError(f"{op}: the model has an adapter {adapter_name!r} already")
    modules = _unwrapped(model)
    saved = [name for name in modules if _ends_with(name, config.modules_to_save or ())]
    targets = [name for name in modules if _is_target(name, config, saved)]
    if not targets:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"{op}: no layer matches target_modules={config.target_modules!r} with "
            f"layers_to_transform={config.layers_to_transform!r}; linear layers are {linear}"
        )
    for name in targets:
        if not isinstance(modules[name], nn.Linear):
            raise ValueError(f"{op}: {name} must be nn.Linear, got {type(modules[name]).__name__}")
    if not configs:
        model.requires_grad_(False)
    for name in targets:
        rank = _by_pattern(name, config.rank_pattern, config.r)
        alpha = _by_pattern(name, config.alpha_pattern, config.lora_alpha)
        _wrap(model, name, LoraLinear).update_layer(adapter_name, config, r=rank, lora_alpha=alpha)
    for name in saved:
        wrapper = _wrap(model, name, ModulesToSave)
        wrapper.modules_to_save[adapter_name] = copy.deepcopy(wrapper.original_module)
    configs[adapter_name] = config
    set_adapter(model, adapter_name)
    if config.inference_mode:
        for parameter in adapter_parameters(model, adapter_name).values():
            parameter.requires_grad_(False)
    return model


def set_adapter(model: nn.Module, adapters: str | Sequence[str]) -> None:
    """Make these adapters the active, trainable ones in every layer that has them; an empty list switches all off."""
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    for name in names:
        _check(model, name)
    for layer in _layers(model):
        has = layer.lora_A if isinstance(layer, LoraLinear) else layer.modules_to_save
        layer.set_adapter([name for name in names if name in has])


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from every layer that has it."""
    _check(model, adapter_name)
    for layer in _layers(model):
        if isinstance(layer, LoraLinear):
            if adapter_name in layer.lora_A:
                layer.delete_adapter(adapter_name)
        elif adapter_name in layer.modules_to_save:
            del layer.modules_to_save[adapter_name]
            layer.set_adapter([name for name in layer.active_adapters if name != adapter_name])
    del model.peft_config[adapter_name]


def merge(model: nn.Module, safe_merge: bool = False) -> None:
    """Merge the active adapters of every layer into its base weight."""
    for layer in _layers(model):
        if isinstance(layer, LoraLinear):
            layer.merge(safe_merge)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of every base weight."""
    for layer in _layers(model):
        if isinstance(layer, LoraLinear):
            layer.unmerge()


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """Parameters of one adapter under their names in the file: without the adapter's name and with PEFT's prefix."""
    _check(model, adapter_name)
    found = {}
    for name, parameter in model.named_parameters():
        # The adapter's name may occur elsewhere in the path too: it counts behind these only.
        path, part, rest = re.fullmatch(r"(.*?)(?:\.(lora_A|lora_B|modules_to_save)\.(.*))?", name).groups()
        owner, _, rest = (rest or "").partition(".")
        if part and owner == adapter_name:
            found[".".join([PREFIX + path, *([] if part == "modules_to_save" else [part]), rest])] = parameter
    return found


def save_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Write one adapter as PEFT does, into `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: there is no such adapter.
        MissingDependency: safetensors is not installed.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in adapter_parameters(model, adapter_name).items()}
    library = require("safetensors.torch", extra="adapters", purpose="saving an adapter")
    settings = {"peft_type": "LORA", **dataclasses.asdict(model.peft_config[adapter_name]), "inference_mode": True}
    folder = Path(folder)
    content = library.save(tensors, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS, lambda file: file.write(content))
    write_atomic(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True))


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> nn.Module:
    """Read an adapter that `save_adapter` or PEFT wrote into a base model of the same shape; returns the model.

    Args:
        model: the base model, with or without other adapters.
        folder: where the two files are.
        adapter_name: name to give the adapter.
        is_trainable: let its parameters train.

    Raises:
        P2KError: a file is missing, uses an option that is not supported, or does not fit the model.
        ValueError: no layer matches, or the name is taken.
        MissingDependency: safetensors is not installed.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise P2KError(f"load_adapter: {folder} holds no {name}; a saved adapter is {CONFIG} and {WEIGHTS}")
    library = require("safetensors.torch", extra="adapters", purpose="loading an adapter")
    config = read_config(folder / CONFIG)
    tensors = library.load_file(folder / WEIGHTS)
    config.inference_mode = not is_trainable
    inject_adapter_in_model(config, model, adapter_name)
    parameters = adapter_parameters(model, adapter_name)
    problem = _misfit(parameters, tensors)
    if problem:
        delete_adapter(model, adapter_name)
        raise P2KError(f"load_adapter: {folder / WEIGHTS} does not fit the model: {problem}")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
    return model


def read_config(path: Path) -> LoraConfig:
    """Read PEFT's configuration file.

    Raises:
        P2KError: it is not of a LoRA adapter, or asks for something that is not supported.
    """
    settings = json.loads(path.read_text())
    if settings.pop("peft_type", None) != "LORA":
        raise P2KError(f"{path}: peft_type must be LORA")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    # Where the adapter came from, and how PEFT handled it in memory: neither changes what it computes.
    harmless = {"auto_mapping", "peft_version", "revision", "runtime_config", "megatron_core", "qalora_group_size"}
    asked = [name for name, value in settings.items() if name not in known | harmless and value]
    if asked:
        raise P2KError(f"{path}: not supported: {', '.join(sorted(asked))}")
    try:
        return LoraConfig(**{name: value for name, value in settings.items() if name in known})
    except ValueError as error:
        raise P2KError(f"{path}: {error}") from error


def _unwrapped(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names they had before any adapter."""
    found, inside = {}, ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside):
            wrapped = isinstance(module, LoraLinear | ModulesToSave)
            found[name] = module.get_base_layer() if wrapped else module
            inside += (f"{name}.",) if wrapped else ()
    return found


def _is_target(name: str, config: LoraConfig, saved: Sequence[str]) -> bool:
    """PEFT's rule: the name or its ending is listed or the expression matches, minus exclusions, in a chosen layer."""
    if any(name == other or name.startswith(f"{other}.") for other in saved):
        return False
    if config.exclude_modules and _ends_with(name, config.exclude_modules):
        return False
    if not config.target_modules or not _ends_with(name, config.target_modules):
        return False
    chosen = config.layers_to_transform
    if chosen is None or chosen == [] or isinstance(config.target_modules, str) or name in config.target_modules:
        return True
    index = _layer_index(name, config.layers_pattern)
    return index is not None and index in ([chosen] if isinstance(chosen, int) else chosen)


def _layer_index(name: str, pattern: Sequence[str] | str | None) -> int | None:
    """The index of the layer in a dotted name."""
    if not pattern:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([pattern] if isinstance(pattern, str) else pattern)]
    matches = filter(None, (re.match(expression, name) for expression in expressions))
    return next((int(match.group(1)) for match in matches), None)


def _ends_with(name: str, wanted: Sequence[str] | str) -> bool:
    """Whether a dotted name is listed, ends in a listed name, or matches the one expression."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def _by_pattern(name: str, patterns: dict, default):
    """The value of the first pattern that matches the end of the name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _wrap(model: nn.Module, name: str, kind: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The wrapper at this place, put there if it is not there yet."""
    module = model.get_submodule(name)
    if not isinstance(module, kind):
        parent, _, attribute = name.rpartition(".")
        module = kind(module)
        setattr(model.get_submodule(parent), attribute, module)
    return module


def _layers(model: nn.Module) -> Iterator[LoraLinear | ModulesToSave]:
    return (module for module in model.modules() if isinstance(module, LoraLinear | ModulesToSave))


def _check(model: nn.Module, adapter_name: str) -> None:
    names = list(getattr(model, "peft_config", {}))
    if adapter_name not in names:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {names}")


def _misfit(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> str | None:
    """Say which names or shapes disagree, or None."""
    odd = sorted(parameters.keys() ^ tensors.keys())
    if odd:
        return f"only one of the two has {', '.join(odd[:4])}"
    wrong = [name for name, tensor in tensors.items() if tensor.shape != parameters[name].shape]
    return f"shapes differ at {', '.join(wrong[:4])}" if wrong else None

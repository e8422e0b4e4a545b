"""LoRA against its equations, its switches and its bad input; `test_lora_peft` has PEFT."""

import json
import math
import os

import peft
import pytest
import torch
from lora_cases import BOTH, Model, inputs, randomised
from torch import nn

from p2k.core.errors import P2KError
from p2k.core.tolerance import tolerance
from p2k.nn import lora_adapters
from p2k.nn.lora import LoraConfig, LoraLinear
from p2k.nn.lora_adapters import (
    adapter_parameters,
    delete_adapter,
    inject_adapter_in_model,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)


def test_at_insertion_nothing_changes_but_b_receives_gradient():
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=BOTH, lora_dropout=0.0), Model())
    found = []
    for model in (Model(), adapted):
        kept = [inputs(5).requires_grad_()]
        for layer in model.encoder["layer"]:
            layer.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        out = model(kept[0])
        found.append([out, *kept, *torch.autograd.grad(out.square().sum(), kept, retain_graph=True)])
    assert len(found[0]) == 1 + 4 + 4
    assert all(map(torch.equal, *found))
    out.square().sum().backward()
    for name, parameter in adapter_parameters(adapted).items():
        assert (parameter.grad == 0).all() == ("lora_A" in name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype):
    base = nn.Linear(8, 6).to(dtype)
    before = base.weight.detach().clone()
    layer = LoraLinear(base)
    layer.update_layer("default", LoraConfig(r=3), r=3, lora_alpha=6)
    randomised([layer.lora_B["default"].weight])
    x = inputs(5).to(dtype)
    expected = layer(x)
    delta = 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    layer.merge(safe_merge=True)
    exact = (before.double() + delta).to(dtype)
    # Summed in float32 and rounded once: at most one unit in the last place away from rounding the exact sum.
    ulp, bound = torch.finfo(dtype).eps, tolerance(dtype, dot=True)
    torch.testing.assert_close(base.weight.data, exact, rtol=ulp, atol=8 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(layer(x), expected, rtol=bound, atol=bound * delta.norm().item())
    layer.merge()
    assert layer.merged_adapters == ["default"]
    layer.unmerge()
    assert layer.merged_adapters == []
    # Each of the two roundings is at most half a unit of the merged weight.
    assert (base.weight.data - before).abs().max() <= ulp * (exact.abs().max() + before.abs().max())


def test_several_adapters():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), Model(), "a")
    inject_adapter_in_model(LoraConfig(r=3, target_modules=BOTH, layers_to_transform=[1]), model, "b")
    for name in "ab":
        randomised(adapter_parameters(model, name).values())
    x, outputs = inputs(5), {}
    for active in ([], ["a"], ["b"], ["a", "b"]):
        set_adapter(model, active)
        outputs[len(active) and "".join(active)] = model(x)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(any(f".{a}." in name for a in active) for name in trained)
    assert torch.equal(outputs[0], Model()(x))
    set_adapter(model, ["a", "b"])
    merge(model)
    torch.testing.assert_close(model(x), outputs["ab"], rtol=1e-4, atol=1e-4)  # three layers of float32 products
    set_adapter(model, "a")
    with pytest.raises(RuntimeError, match="are merged but"):
        model(x)
    unmerge(model)
    delete_adapter(model, "b")
    # Weights that were added to and subtracted from in float32, through three layers.
    torch.testing.assert_close(model(x), outputs["a"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no adapter 'b'"):
        set_adapter(model, "b")


def test_deleting_a_merged_adapter_takes_it_out():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]), Model())
    randomised(adapter_parameters(model).values())
    merge(model)
    delete_adapter(model, "default")
    torch.testing.assert_close(model(inputs(5)), Model()(inputs(5)), rtol=1e-4, atol=1e-4)  # float32, added and removed


def test_dropout_acts_on_the_adapter_in_training_only():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"], lora_dropout=0.5), Model())
    randomised(adapter_parameters(model).values())
    x = inputs(5)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    set_adapter(model, [])
    assert torch.equal(model.train()(x), Model()(x))


def test_initialisation_and_scaling():
    layer = LoraLinear(nn.Linear(512, 512))
    layer.update_layer("kaiming", LoraConfig(), r=4, lora_alpha=8)
    layer.update_layer("normal", LoraConfig(init_lora_weights="gaussian", use_rslora=True), r=4, lora_alpha=8)
    layer.update_layer("random", LoraConfig(init_lora_weights=False), r=4, lora_alpha=8)
    assert layer.scaling == {"kaiming": 2.0, "normal": 4.0, "random": 2.0}
    bound = 1 / math.sqrt(512)
    assert bound * 0.9 < layer.lora_A["kaiming"].weight.abs().max() <= bound
    assert 0.2 < layer.lora_A["normal"].weight.std() < 0.3
    assert (layer.lora_B["kaiming"].weight == 0).all()
    assert (layer.lora_B["random"].weight != 0).any()


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"fan_in_fan_out": True}, {"target_parameters": ["w"]},
     {"r": 0}, {"rank_pattern": {"query": 0}}, {"lora_dropout": 1.0}, {"init_lora_weights": "pissa"}],
    ids=str,
)  # fmt: skip
def test_unsupported_options_raise(options):
    with pytest.raises(
        ValueError, match=f"LoraConfig: .*{'query' if 'rank_pattern' in options else next(iter(options))}"
    ):
        LoraConfig(**options)


def test_bad_targets():
    with pytest.raises(ValueError, match="no layer matches.*classifier"):
        inject_adapter_in_model(LoraConfig(target_modules=["key"]), Model())
    with pytest.raises(ValueError, match="must be nn.Linear, got ModuleList"):
        inject_adapter_in_model(LoraConfig(target_modules=["layer"]), Model())
    model = inject_adapter_in_model(LoraConfig(target_modules=["query"]), Model())
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        inject_adapter_in_model(LoraConfig(target_modules=["query"]), model)
    layer = model.encoder["layer"][0].query
    with pytest.raises(ValueError, match="no adapter 'x'"):
        layer.merge(adapter_names=["x"])
    layer.lora_B["default"].weight.data.fill_(torch.inf)
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite; nothing was changed"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_bad_files(tmp_path):
    with pytest.raises(P2KError, match=r"holds no adapter_config\.json"):
        load_adapter(Model(), tmp_path)
    peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["query"], use_dora=True)).save_pretrained(
        tmp_path
    )
    with pytest.raises(P2KError, match="use_dora must be False"):
        load_adapter(Model(), tmp_path)
    save_adapter(inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), Model()), tmp_path)
    path = tmp_path / lora_adapters.CONFIG
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"velora_config": {"rank": 1}}))
    with pytest.raises(P2KError, match="not supported: velora_config"):
        load_adapter(Model(), tmp_path)
    path.write_text(json.dumps(settings | {"r": 3}))
    model = Model()
    with pytest.raises(P2KError, match="shapes differ at base_model.model.encoder"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(inputs(5)), Model()(inputs(5)))
    path.write_text(json.dumps(settings | {"target_modules": ["value"]}))
    with pytest.raises(P2KError, match="only one of the two has"):
        load_adapter(Model(), tmp_path)
    path.write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(P2KError, match="peft_type must be LORA"):
        load_adapter(Model(), tmp_path)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), Model())
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomised(adapter_parameters(model).values())
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

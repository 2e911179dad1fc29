"""What PEFT's ``add_weighted_adapter`` makes of two adapters of two linear layers.

``python weighted_adapters.py IN.npz OUT.npz`` in an environment with torch and peft. IN holds
``ranks``, ``alphas``, ``weights`` (cases, 2), ``svd_rank`` and, for each adapter i and layer,
``i/layer/a`` (in, r) and ``i/layer/b`` (r, out); the first adapter may lack a layer. OUT holds
Delta W (in, out) as ``how/case/layer``.
"""

import sys

import numpy as np
import peft
import torch


def main(source, target):
    data = np.load(source)
    sizes = {"first": (6, 5), "second": (5, 4)}
    net = torch.nn.Sequential()
    for layer, (size_in, size_out) in sizes.items():
        net.add_module(layer, torch.nn.Linear(size_in, size_out))
    model = None
    for i in range(2):
        layers = [layer for layer in sizes if f"{i}/{layer}/a" in data]
        config = peft.LoraConfig(
            r=int(data["ranks"][i]), lora_alpha=float(data["alphas"][i]), target_modules=layers
        )
        if model is None:
            model = peft.get_peft_model(net, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        for layer in layers:
            module = model.base_model.model.get_submodule(layer)
            for name, factors in (("a", module.lora_A), ("b", module.lora_B)):
                value = torch.tensor(data[f"{i}/{layer}/{name}"].T.copy())
                factors[str(i)].weight.data = value
    out = {}
    hows = ["svd", "cat"] + ["linear"] * bool(data["ranks"][0] == data["ranks"][1])
    for how in hows:
        for case, weights in enumerate(data["weights"]):
            name = f"{how}{case}"
            options = {"svd_rank": int(data["svd_rank"])} if how == "svd" else {}
            model.add_weighted_adapter(
                ["0", "1"], weights.tolist(), name, combination_type=how, **options
            )
            for layer in sizes:
                module = model.base_model.model.get_submodule(layer)
                delta = module.get_delta_weight(name).detach().numpy().T
                out[f"{how}/{case}/{layer}"] = np.ascontiguousarray(delta)
    np.savez(target, **out)


main(*sys.argv[1:])

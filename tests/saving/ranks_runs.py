"""Work on real processes: runs that go on after a save, copies, submodules, and adapters of peft."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import autotp
from autotp.verification.measure import Float64
from tests.comparison import raised
from tests.models import make
from tests.saving.ranks import differing, files_of, model_of, once, parallel

Result = dict[str, Any]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> float:
    optimizer.zero_grad()
    with Float64():
        loss = model(**inputs)[0]
    loss.backward()
    optimizer.step()
    return float(loss)


def going_on(rank: int, world: int, folder: Path, name: str) -> Result:
    """Steps, calls and ``generate`` after each way to save, compared with a dense model that does the same."""
    dense, inputs = model_of(name)
    model = parallel(name, world)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (dense, model)]
    result: Result = {}

    def old_way(path: Path) -> None:
        state = autotp.full_state_dict(model)
        once(rank, model.save_pretrained, path, state_dict=state, max_shard_size="60KB")  # type: ignore[operator]

    def old_way_on_all(path: Path) -> None:
        model.save_pretrained(path, state_dict=autotp.full_state_dict(model, rank=0), max_shard_size="60KB")  # type: ignore[operator]

    def without_gradients(path: Path) -> None:
        with torch.inference_mode():
            autotp.save(model, path, max_shard_size="60KB")

    ways: dict[str, Callable[[Path], Any]] = {
        "save": lambda path: autotp.save(model, path, max_shard_size="60KB"),
        "save_pretrained": lambda path: model.save_pretrained(path, rank == 0, max_shard_size="60KB"),  # type: ignore[operator]
        "rank 0 alone": old_way,
        "all, of which one has a state": old_way_on_all,
        "in inference mode": without_gradients,
    }
    for way, save in ways.items():
        losses = [_step(m, o, inputs) for m, o in zip((dense, model), optimizers, strict=True)]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        path = folder / name / way
        save(path)
        unchanged = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        full = autotp.full_state_dict(model)
        once(rank, _saved_dense, name, full, folder / name / "dense")
        result[way] = abs(losses[0] - losses[1]) < 1e-9, unchanged, differing(folder / name / "dense", path)
        again = parallel(name, world, weights=path)
        state = autotp.full_state_dict(again)
        result[f"{way}: read"] = [n for n, x in full.items() if not torch.equal(state[n], x)]
    if rank == 0:
        loaded = type(dense).from_pretrained(folder / name / "save_pretrained", dtype=torch.float64)  # type: ignore[attr-defined]
        result["from_pretrained"] = loaded.num_parameters() == dense.num_parameters()  # type: ignore[operator]
    ids = inputs["input_ids"][:, :4]
    with Float64():
        found, expected = (m.eval().generate(ids, max_new_tokens=3, do_sample=False) for m in (model, dense))  # type: ignore[operator]
    result["generate"] = torch.equal(found, expected)
    result["captures"] = str(autotp.graph(model)).splitlines()[0]
    return result


def _saved_dense(name: str, full: dict[str, torch.Tensor], path: Path) -> None:
    dense = model_of(name)[0]
    dense.load_state_dict(full)
    dense.save_pretrained(path, max_shard_size="60KB")  # type: ignore[operator]


def copies(rank: int, world: int, folder: Path) -> Result:
    """Copies, submodules, refused options, and threads."""
    result: Result = {}
    model, dense = parallel("llama", world), model_of("llama")[0]
    once(rank, dense.save_pretrained, folder / "dense")  # type: ignore[operator]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    copied.save_pretrained(folder / "copied")  # type: ignore[operator]
    autotp.save(copied, folder / "copied too")
    result["copy"] = differing(folder / "dense", folder / "copied")
    result["copy, by save"] = differing(folder / "dense", folder / "copied too")
    outer = copy.deepcopy(nn.ModuleDict({"m": copied}))["m"]
    autotp.save(outer, folder / "outer")
    result["copy inside"] = differing(folder / "dense", folder / "outer")
    result["pickle"] = raised(lambda: pickle.dumps(copied))
    once(rank, dense.model.save_pretrained, folder / "dense inner")  # type: ignore[union-attr, operator]
    copied.model.save_pretrained(folder / "inner")  # type: ignore[union-attr, operator]
    autotp.save(copied.model, folder / "inner too")  # type: ignore[arg-type]
    result["inner"] = differing(folder / "dense inner", folder / "inner")
    result["inner, by save"] = differing(folder / "dense inner", folder / "inner too")
    layer, plain = copied.model.layers[0], dense.model.layers[0]  # type: ignore[union-attr, index]
    autotp.save(layer, folder / "layer")
    found = load_file(folder / "layer" / "model.safetensors")
    result["layer"] = [n for n, x in plain.state_dict().items() if not torch.equal(found[n], x)]
    for name, options in {
        "hub": {"push_to_hub": True}, "distributed": {"distributed_checkpoint": True}, "peft": {"unknown": 1},
    }.items():  # fmt: skip
        result[name] = raised(lambda options=options: copied.save_pretrained(folder / "refused", **options))  # type: ignore[misc, operator]
    old = files_of(folder / "copied")
    copied.save_pretrained(folder / "copied", True, None, False, "5GB", "fp16")  # type: ignore[operator]
    kept = files_of(folder / "copied")
    result["variant"] = sorted(kept.keys() - old.keys()), all(kept[n] == x for n, x in old.items())
    with torch.no_grad():
        copied.model.layers[0].self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.t().contiguous().t()  # type: ignore[union-attr, index, operator]
    autotp.save(copied, folder / "transposed")
    result["transposed"] = differing(folder / "dense", folder / "transposed")
    ids, errors = make("llama", 1, 9)[1]["input_ids"], []
    thread = threading.Thread(target=lambda: errors.append(raised(lambda: autotp.save(copied, folder / "thread"))))
    with Float64():
        copied(input_ids=ids, use_cache=False)
        autotp.save(copied, folder / "after a call")
    result["after a call"] = differing(folder / "dense", folder / "after a call")
    thread.start()
    thread.join()
    result["thread"] = errors[0], differing(folder / "dense", folder / "thread")
    return result


def _adapted(kind: str) -> Any:
    """A small Llama with adapters, which are off zero."""
    import peft

    model = model_of("llama")[0].float()
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
    options |= {"dora": {"use_dora": True}, "saved": {"modules_to_save": ["lm_head"]}}.get(kind, {})
    options |= {"embedding": {"target_modules": ["embed_tokens", "q_proj"]}}.get(kind, {})
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    if kind == "several":
        adapted.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return adapted


def adapters(rank: int, world: int, folder: Path) -> Result:
    """Adapters of peft, saved in each way, and what peft reads back."""
    import peft

    result: Result = {}
    for kind in ("lora", "dora", "saved", "embedding", "several"):
        dense, model = _adapted(kind), _adapted(kind)
        inputs = {"input_ids": torch.arange(18).view(2, 9), "use_cache": False}
        model = autotp.parallelize(model, world, example_inputs=inputs)
        once(rank, dense.save_pretrained, folder / f"dense {kind}")
        model.save_pretrained(folder / kind, True, None, "auto", rank == 0)  # safe, all adapters, embeddings, main
        result[kind] = differing(folder / f"dense {kind}", folder / kind)
        autotp.save(model, folder / f"{kind} by save")
        result[f"{kind} by save"] = differing(folder / f"dense {kind}", folder / f"{kind} by save")
        if kind == "several":
            once(rank, dense.save_pretrained, folder / "dense other", selected_adapters=["other"])
            model.save_pretrained(folder / "other", selected_adapters=["other"])
            result["other"] = differing(folder / "dense other", folder / "other")
            result["bin"] = raised(lambda: model.save_pretrained(folder / "bin", False))  # noqa: B023
        read = peft.PeftModel.from_pretrained(model_of("llama")[0].float(), folder / kind)
        with torch.no_grad():
            away = read(**inputs).logits - model(**inputs).logits
        result[f"{kind}: read"] = float(away.abs().max())
    return result

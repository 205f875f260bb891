"""Methods in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`, written and read without PEFT.

    prompt-tuning    prompt_embeddings (P, D); of an encoder-decoder's 2 P rows PEFT only ever uses the first P
    prefix-tuning    prompt_embeddings (P, L * 2 * heads * head width), key before value; causal models
    lora             base_model.model.<module>.lora_A.weight (r, d_in) and lora_B.weight (d_out, r)

Read only: P-tuning, of which PEFT saves the prompt that its network made, and LoRA scaled by alpha / sqrt(r) (rsLoRA).
What is read is an ordinary method: it can be trained on, saved in our files, and put into a bank.

What would compute something else there and here is refused: PEFT puts a prefix on an encoder-decoder's decoder only. A
left-padded batch differs in any case: PEFT 0.21 puts a soft prompt before the pads.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from odqa.errors import ArtifactError
from odqa.frozen.backbone import Backbone
from odqa.frozen.lora import Lora
from odqa.frozen.method import Method, as_key, as_name, create_method, load_tensors
from odqa.frozen.prefix import PrefixTuning
from odqa.frozen.prompt_tuning import PromptTuning

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {"encoder": "FEATURE_EXTRACTION", "causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
# Settings of PEFT's LoRA that change what it computes, and the values that Lora has for them.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The other starts of A and B change the frozen weights too, and PEFT does so again when it loads.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}


def save_peft(method: Method, backbone: Backbone, folder: Path) -> None:
    """Write a method as PEFT does, in float32. Raises ArtifactError for one that PEFT lacks or computes otherwise."""
    config: dict[str, Any] = {
        "base_model_name_or_path": backbone.name,
        "task_type": _TASKS[backbone.architecture],
        "inference_mode": True,
    }
    if isinstance(method, PromptTuning):
        submodules = 2 if backbone.architecture == "seq2seq" else 1
        vectors = method.prompt.detach().repeat(submodules, 1)
        config |= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": method.length, "token_dim": vectors.shape[1]}
        config["num_transformer_submodules"] = submodules
        tensors = {"prompt_embeddings": vectors}
    elif isinstance(method, PrefixTuning):
        _check_prefix(backbone, str(folder))
        prefix = method.side_vectors("self").detach()  # (2, L, heads, P, head width)
        _, layers, heads, length, width = prefix.shape
        tensors = {"prompt_embeddings": prefix.permute(3, 1, 0, 2, 4).reshape(length, -1)}
        config |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "token_dim": heads * width}
        config |= {"num_layers": layers, "num_attention_heads": heads, "num_transformer_submodules": 1}
    elif isinstance(method, Lora):
        modules = [as_name(key) for key in method.A]
        config |= {"peft_type": "LORA", "r": method.settings["rank"], "lora_alpha": method.settings["alpha"]}
        config |= {"target_modules": modules, "lora_dropout": 0.0, "bias": "none"}
        tensors = {
            f"base_model.model.{as_name(key)}.lora_{letter}.weight": tensor.detach()
            for letter, matrices in (("A", method.A), ("B", method.B))
            for key, tensor in matrices.items()
        }
    else:
        raise ArtifactError(
            f"{folder}: PEFT has no {method.kind}; prompt-tuning, prefix-tuning and lora can be written."
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_peft(folder: Path, backbone: Backbone) -> Method:
    """Read what PEFT saved. PEFT does not say which weights it was trained on, so that is not checked here.

    Raises ArtifactError for missing files, for a kind or a setting that computes something else here, and for tensors
    that do not fit the backbone.
    """
    config, tensors = _read(folder)
    kind = config.get("peft_type")
    where = str(folder / TENSORS)
    if kind not in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LORA"):
        raise ArtifactError(f"{folder}: {kind} is not supported; PROMPT_TUNING, P_TUNING, PREFIX_TUNING and LORA are.")
    if needed := [name for name in _NEEDED[kind] if name not in config]:
        raise ArtifactError(f"{folder / CONFIG}: {needed[0]} is missing.")
    if kind in ("PROMPT_TUNING", "P_TUNING"):
        length = int(config["num_virtual_tokens"])
        prompt = _only(tensors, "prompt_embeddings", where)[:length]
        return _filled("prompt-tuning", backbone, {"prompt": prompt}, where, length=length)
    if kind == "PREFIX_TUNING":
        _check_prefix(backbone, str(folder))
        length, layers = int(config["num_virtual_tokens"]), int(config["num_layers"])
        flat = _only(tensors, "prompt_embeddings", where)
        prefix = flat.reshape(length, layers, 2, int(config["num_attention_heads"]), -1).permute(2, 1, 3, 0, 4)
        return _filled("prefix-tuning", backbone, {"prompt": prefix}, where, length=length, inner=None)
    for name, plain in _PLAIN_LORA.items():
        if config.get(name) not in plain:
            raise ArtifactError(f"{folder}: {name} is {config[name]!r}; LoRA is read with {name}: {plain[0]!r} only.")
    own, modules = {}, []
    for name, tensor in tensors.items():
        module, _, letter = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        own[f"{letter}.{as_key(module)}"] = tensor
        modules.append(module)
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    alpha *= rank**0.5 if config.get("use_rslora") else 1.0
    return _filled("lora", backbone, own, where, rank=rank, alpha=alpha, targets=sorted(set(modules)))


_NEEDED = {
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens", "num_layers", "num_attention_heads"),
    "LORA": ("r", "lora_alpha"),
}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors, in float32."""
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: not a checkpoint of PEFT ({name} is missing).")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = {name: tensor.float() for name, tensor in load_file(folder / TENSORS).items()}
    except (ValueError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: a damaged checkpoint of PEFT ({str(error).splitlines()[0]}).") from error
    return config, tensors


def _filled(kind: str, backbone: Backbone, tensors: dict[str, torch.Tensor], where: str, **settings: Any) -> Method:
    method = create_method(kind, backbone, **settings)
    load_tensors(method, tensors, where)
    return method


def _only(tensors: dict[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    if set(tensors) != {name}:
        raise ArtifactError(f"{where}: holds {', '.join(sorted(tensors))}; expected {name} alone.")
    return tensors[name]


def _check_prefix(backbone: Backbone, where: str) -> None:
    if backbone.architecture != "causal":
        raise ArtifactError(
            f"{where}: a prefix for {backbone.name} ({backbone.architecture}) computes something else in PEFT; only "
            "causal models share it."
        )

"""What the JSON files beside a checkpoint tell of its tensors: config.json, and adapter_config.json of peft, which alone knows LoRA's scale.

A scale is told only where the file is of such an adapter: its rank is that of the factors, and no option is set that changes the product.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import WorkbenchError
from workbench.files import Span

_FILES = ("config.json", "adapter_config.json")
_MOST = 1 << 20  # bytes
_MOST_KEYS, _MOST_LETTERS = 4096, 300  # of a pattern per module


def config_beside(ckpt: Checkpoint) -> dict[str, Any]:
    """The options of config.json, and those of the adapter under that file's name; of a file opened by itself, the adapter's alone."""
    told = {name: ckpt.metadata[name] for name in _FILES if name in ckpt.metadata}
    file, name = ckpt.source, _FILES[1]
    if name not in told and file is not None and file.address is None and any("lora_" in tensor for tensor in ckpt):
        with suppress(WorkbenchError):  # it is not there, or no file
            beside = file.folder.file(name)
            told[name] = Span(beside, 0, min(beside.size, _MOST)).read().decode("utf-8", "replace")
    options: list[dict[str, Any]] = []
    for name in _FILES:
        found: Any = None
        with suppress(ValueError, RecursionError):  # no JSON: as if it were not there
            found = json.loads(told.get(name, "{}"))
        options.append(found if isinstance(found, dict) else {})
    return {**options[0], name: options[1]}


_NEUTRAL = frozenset((  # of peft's LoraConfig: these do not change what one adapter adds to a weight, or are asked for by name
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "target_modules",
    "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "lora_bias", "target_parameters",
    "ensure_weight_tying",
))  # fmt: skip
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that change the base as well


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> tuple[float | None, str]:
    """(lora_alpha / r of a module as peft computes it, how), or None and why it is not told."""
    told = config.get(_FILES[1]) or {}
    if "lora_alpha" not in told:
        return None, "merging needs lora_alpha / r (adapter_config.json), and no name tells whether it was merged already"
    alpha, r = (_of_module(told, f"{word}_pattern", module, told.get(key)) for word, key in (("alpha", "lora_alpha"), ("rank", "r")))
    begun, root = str(told.get("init_lora_weights")).lower(), bool(told.get("use_rslora"))
    if told.get("peft_type") != "LORA":
        return None, f"adapter_config.json is of {told.get('peft_type')}, and how that is merged only peft's code tells"
    if strange := [option for option, value in told.items() if value and option not in _NEUTRAL]:
        return None, f"adapter_config.json sets {strange[0]!r}, and what that makes of the merged weight only peft's code tells"
    if begun.startswith(_BASE_CHANGED):
        return (
            None,
            f"adapter_config.json says init_lora_weights = {begun!r}, which changes the base: whether this is that base is not told",
        )
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30 or type(r) is not int or r != rank or not r:
        return None, f"adapter_config.json says lora_alpha = {alpha!r} and r = {r!r} for it, and lora_A has the rank {rank}"
    scale = float(alpha / (math.sqrt(r) if root else r))
    return scale, f"base + {scale:g} * B A: lora_alpha {alpha:g} / {f'sqrt({r})' if root else r} of adapter_config.json"


def _of_module(told: Mapping[str, Any], option: str, module: str, default: Any) -> Any:
    """The value of the first pattern that names the module, as peft looks; None where that cannot be known, or would take long."""
    patterns, (_, root, path) = told.get(option) or {}, module.removesuffix(".").rpartition("base_model.model.")
    if not isinstance(patterns, dict) or len(patterns) > _MOST_KEYS or len(path) > _MOST_LETTERS:
        return None
    for key, value in patterns.items():
        pattern = _compiled(key)
        if pattern is None or ("^" in key and not root):
            return None
        if pattern.match(path):
            return value
    return default


@lru_cache(maxsize=_MOST_KEYS)
def _compiled(key: str) -> re.Pattern[str] | None:
    """A stranger's pattern, with at most two repetitions and none of a group: others can take for ever."""
    if len(key) > _MOST_LETTERS or len(re.findall(r"[*+{]", key)) > 2 or re.search(r"\)[*+{?]", key):
        return None
    with suppress(re.error):
        return re.compile(rf"(.*\.)?({key})$")
    return None

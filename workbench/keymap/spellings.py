"""Stored tensors that are published under several names: `canonical` gives all spellings of one the same name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from workbench.keymap.composites import adapters_in, beside_bases, families, tuners_in


class Spelling(NamedTuple):
    """What a name is, whoever wrote it.

    Attributes:
        name: equal for all spellings of the same stored tensor.
        role: what the tensor is, where it is no plain parameter or buffer; it fills only a target of the same role.
        also: canonical names of plain sources that fill it as well, where it is a target.
    """

    name: str
    role: str = ""
    also: tuple[str, ...] = ()


def canonical(names: Collection[str], others: Collection[str] = ()) -> dict[str, Spelling]:
    """The names of one side (source or target) that are not spelt as plain names are, each with its Spelling.

    Args:
        others: canonical names of the other side, for spellings that lose dots (kohya's).
    """
    names = dict.fromkeys(names).keys()  # looked up one by one
    out: dict[str, Spelling] = {}
    for plain, pieces in families(names).items():
        module, _, leaf = plain.rpartition(".")
        for piece, name in pieces.items():
            held = f"{plain}_{piece}" if piece in ("orig", "mask") else ".".join(filter(None, (module, "parametrizations", leaf, piece)))
            out[name] = Spelling(held, f"parametrization: {piece}", (plain,) if piece == "orig" else ())
    adapters = adapters_in(names)
    told = "\0".join(names)
    marked = bool(adapters) or any(word in told for word in ("lora", "modules_to_save.", "base_layer.", "prompt_encoder."))
    if not marked and not all("base_model." in name for name in names):
        return out
    beside = beside_bases(names)
    tuners, named = tuners_in(beside), _adapter_name(beside)
    flat: dict[str, set[str]] = defaultdict(set)
    for other in others:
        if other.endswith(".lora_A.weight"):
            flat[other.removesuffix(".lora_A.weight").replace(".", "_")].add(other)
    for name in names:
        spelt, role, also = out.get(name, Spelling(name))
        spelt = named.sub(r"\1", spelt) if named is not None else spelt
        for word, pattern, new in _SPELLINGS:
            if word in spelt:
                spelt = pattern.sub(new, spelt, count=1)
        module, dot, leaf = name.rpartition(".")
        if "lora_" in spelt and (lora := _ROLE.search(spelt)):
            role = lora[1]
            if role.endswith(".weight") and (kohya := _KOHYA.fullmatch(spelt)) and len(fits := flat[kohya[1]]) == 1:
                spelt = next(iter(fits)).replace("lora_A", role.removesuffix(".weight"))
        elif "original_module." in spelt:
            role = "copy that modules_to_save replaces"
        elif leaf in ("weight", "bias") and (module.endswith("base_layer") or (module + dot) in adapters):
            module = (module + dot).removesuffix("base_layer.")
            plain = spelt[: -len(leaf)].removesuffix("base_layer.") + leaf
            if module in tuners or any(f"B.{leaf}" in pieces for pieces in adapters.get(module, {}).values()):
                spelt, role, also = plain[: -len(leaf)] + f"base_layer.{leaf}", "base of an adapter", (plain,)
            else:
                spelt = plain
        if spelt != name or role:
            out[name] = Spelling(spelt, role, also)
    return out


_ROLE = re.compile(r"(?:^|\.)(lora_[^.]+(?:\.(?:weight|bias))?)$")
_KOHYA = re.compile(r"lora_(?:unet|te\d?|transformer|prior)_(\w+)\.lora_[AB]\.weight")
_SPELLINGS = [
    (word, re.compile(pattern), new)
    for word, pattern, new in (
        ("base_model.model.", r"(^|\.)base_model\.model\.", r"\1"),
        ("modules_to_save.", r"(^|\.)modules_to_save\.[^.]+\.", r"\1"),
        ("prompt_encoder.", r"(^|\.)prompt_encoder\.[^.]+\.embedding\.weight$", r"\1prompt_embeddings"),
        (".processor.", r"\.processor\.(to_[qkv])_lora\.", r".\1.lora."),  # diffusers, before it used peft
        (".processor.", r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
        ("down.weight", r"\.lora(?:_linear_layer\.|\.|_)down\.weight$", ".lora_A.weight"),
        ("up.weight", r"\.lora(?:_linear_layer\.|\.|_)up\.weight$", ".lora_B.weight"),
        ("lora_", r"\blora_([AB])\.[^.]+\.(weight|bias)$", r"lora_\1.\2"),
        ("lora_", r"\b(lora_magnitude_vector|lora_embedding_[AB])(?:\.[^.]+)?(?:\.weight)?$", r"\1"),
    )
]


def _adapter_name(beside: Mapping[str, list[str]]) -> re.Pattern[str] | None:
    """What takes the adapter's name out, which its file leaves out, where all that an adapter put there has the same one."""
    put = [name[len(module) :].split(".") for module, found in beside.items() for name in found]
    if len(given := {segments[1] for segments in put if len(segments) > 1}) != 1:
        return None
    words = "|".join(sorted({re.escape(segments[0]) for segments in put}))
    return re.compile(rf"(?<=\.)({words})\.{re.escape(given.pop())}(?=\.|$)")

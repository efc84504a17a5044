"""What published conventions do beyond words: numbers counted in another way, and norms that hold one more."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from workbench.keymap.conventions import ONE_MORE
from workbench.keymap.fusions import Item
from workbench.keymap.naming import bare_name

if TYPE_CHECKING:
    from workbench.keymap.targets import Target

_REVERSED = re.compile(r"(.*\bdecoder\.up\.)(\d+)(\.(?:block|attn|upsample)\..+)")
_MEMBER = re.compile(r"(.*\.)layers\.(\d+)(\.(?:weight|bias))")
_END = re.compile(r"(.*\.)proj_(in|out)(\.(?:weight|bias))")


def counted(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Names that count otherwise than the other side does, as that would count them: decoders of LDM and of taming transformers from their
    output, and linear layers of which the first and the last have words (`proj_in`, `layers.0`, `proj_out` of transformers' SAM)."""
    out: dict[str, str] = {}
    ups = [found for name in names if "decoder.up." in name and (found := _REVERSED.fullmatch(name))]
    if ups and any("decoder.up_blocks." in name for name in others):
        last = max(int(found[2]) for found in ups)
        out |= {found[0]: f"{found[1]}{last - int(found[2])}{found[3]}" for found in ups}
    ends = [found for name in names if ".proj_" in name and (found := _END.fullmatch(name))]
    lists, theirs = (_lists(side) if ends else {} for side in (names, others))
    for found in ends:
        last = lists.get(found[1], -1) + 2
        if found[1] in lists and last in {n for place, n in theirs.items() if place.split(".")[-2:] == found[1].split(".")[-2:]}:
            out[found[0]] = f"{found[1]}layers.{0 if found[2] == 'in' else last}{found[3]}"
            out |= {f"{found[1]}layers.{n}{found[3]}": f"{found[1]}layers.{n + 1}{found[3]}" for n in range(last - 1)}
    return out


def _lists(names: Iterable[str]) -> dict[str, int]:
    """Where `layers` hold weights themselves, and the last number of each."""
    out: dict[str, int] = {}
    for found in filter(None, map(_MEMBER.fullmatch, names)):
        out[found[1]] = max(out.get(found[1], 0), int(found[2]))
    return out


_LLAMA_CPP = re.compile(r"(?:blk\.\d+\.(?!ssm_)\w+|output)_norm\.weight")


def one_more(items: Iterable[Item], target: Target, architecture: str) -> list[Item]:
    """The norms of a llama.cpp file that hold one more than the target's do, less one: those of models that multiply by 1 + weight."""
    norms = [i for i in items if i.name.endswith("_norm.weight") and _LLAMA_CPP.fullmatch(bare_name(i.name)) and not i.formula]
    kinds = set(target.kinds.values()) if norms else set()
    told = architecture.rstrip("0123456789") == "gemma" or any("pre_feedforward_layernorm" in name for name in target.shapes if norms)
    if not (kinds & ONE_MORE if kinds else told) or any(_LLAMA_CPP.fullmatch(bare_name(name)) for name in target.shapes if norms):
        return []
    note = "less the 1 that llama.cpp adds to these norms"
    params = [{"shape": list(i.shape), "dtype": i.dtype, "by": -1.0} for i in norms]
    return [i._replace(formula="shifted", note=note, params=p) for i, p in zip(norms, params, strict=True)]

"""What a match costs: seconds of the processor, and a key's cost among many as a ratio to its cost among few. Printed, never judged.

    python tests/benchmarks/matching.py

A model of 288 and one of 100,032 renamed keys (blocks with experts, one library's names to another's), and keys without structure:
nothing that matches, and everything ambiguous. Least of several runs; a ratio near 1 says that the cost grows with the keys alone.
"""

import time

import torch

import workbench as wb

WORDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}


def renamed(layers, experts):
    ours, theirs = {}, {}
    for layer in range(layers):
        for word, new in WORDS.items():
            for n in range(experts if word[1].isdigit() else 1):
                block = f"feed_forward.experts.{n}" if word[1].isdigit() else "attention"
                shape = {"w1": (4, 2), "w2": (2, 4), "w3": (4, 2)}.get(word, (2, 2))
                ours[f"layers.{layer}.{block}.{word}.weight"] = shape
                block = block.replace("feed_forward", "mlp").replace("attention", "self_attn")
                theirs[f"model.layers.{layer}.{block}.{new}.weight"] = shape
        for old, new in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            ours[f"layers.{layer}.{old}.weight"] = theirs[f"model.layers.{layer}.{new}.weight"] = (2,)
    return ours, theirs


def word(n):
    return "".join(chr(97 + int(digit)) for digit in str(n))


def strangers(count):
    return {f"{word(n)}k.a.weight": (4, 2) for n in range(count)}, {f"{word(n)}l.b.table": (5, 3) for n in range(count)}


def ambiguous(count):
    return {f"{word(n)}k.norm.weight": (4,) for n in range(count)}, {f"{word(n)}l.norm.weight": (4,) for n in range(count)}


def seconds(names, runs):
    source, target = names
    ckpt = wb.open({name: torch.empty(shape, device="meta") for name, shape in source.items()})
    times = []
    for _ in range(runs):
        start = time.process_time()
        keymap = wb.match(ckpt, target)
        times.append(time.process_time() - start)
    return min(times), len(target), keymap


def main():
    for title, few, many in (
        ("renamed", renamed(32, 1), renamed(32, 1040)),
        ("nothing matches", strangers(1000), strangers(20_000)),
        ("all ambiguous", ambiguous(1000), ambiguous(20_000)),
    ):
        (little, first, _), (much, count, keymap) = seconds(few, 9), seconds(many, 3)
        told = f"{len(keymap.pairs)} pairs, {len(keymap.ambiguous)} ambiguous, {len(keymap.unmatched)} unmatched"
        print(
            f"{title:16} {first:5} keys {little * 1e3:7.1f} ms   {count:6} keys {much:6.2f} s   a key {much / count / (little / first):.2f} x   {told}"
        )


if __name__ == "__main__":
    main()

from __future__ import annotations

import subprocess
import sys

import pytest
from render_samples import HOSTILE, XSS, Sample, SampleReport, finding, transformer

from workbench.render import outline, text
from workbench.tables import format_bytes


def test_checkpoint_golden() -> None:
    ckpt = Sample(
        transformer(), name="epoch_12.ckpt", extras={"epoch": 12}, findings=[finding("it calls os.system", hint="do not load it")]
    )
    assert text.render_checkpoint(ckpt).splitlines() == [
        "epoch_12.ckpt · 37 tensors · 7.04 kB · float32",
        "⚠ it calls os.system",
        "    do not load it",
        "    embed.weight                3.2 kB  [100, 8]  float32",
        "  ▾ model.layers.{0-11}    36  3.84 kB",
        "      attn.q.weight      12 ×    256 B  [8, 8]    float32",
        "      attn.q.bias        12 ×     32 B  [8]       float32",
        "      norm.weight        12 ×     32 B  [8]       float32",
        "also epoch = 12",
    ]


def test_report_golden() -> None:
    assert text.render_report(SampleReport()).splitlines() == [
        "✓ fc.weight is as it should be",
        "",
        "Rows of fc.weight",
        "  name       mark  shape        bytes    error    kept     time",
        "  fc.weight  ~     [10, 512]  44.7 MB  1.3e-06  99.1 %  12.3 ms",
        "  fc.weight  +     –                –        –       –        –",
        "",
        "Nothing here",
        "  no row for fc.weight",
    ]
    assert text.render_report(SampleReport(clean=False)).startswith("✗ ")


def test_long_output_is_cut_and_says_how_to_see_the_rest() -> None:
    ckpt = Sample({f"block_{i}.part.{part}": (i + 1,) for i in range(100) for part in ("a", "b")})
    shown = text.render_checkpoint(ckpt).splitlines()
    assert len(shown) == 1 + text.MAX_ROWS + 1
    assert shown[-1] == "  … 240 more, ckpt.select('block_60.*')"


def test_deep_levels_fold_before_rows_are_cut() -> None:
    ckpt = Sample({f"part_{i}.inner_{j}.{k}.w": (i + 1, j + 1, k + 1) for i in range(3) for j in range(4) for k in range(20)})
    shown = text.render_checkpoint(ckpt).splitlines()
    assert [line.split()[1] for line in shown if "part_" in line and "▾" in line] == ["part_0", "part_1", "part_2"]
    assert sum("inner_" in line and "▸" in line for line in shown) == 12
    assert shown[-1].endswith("more, ckpt.select('part_0.*')")


@pytest.mark.parametrize("name", HOSTILE)
def test_no_control_character_reaches_the_terminal(name: str) -> None:
    ckpt = Sample({name: (1,), "x.y": (2,)}, name=name, extras={name: name}, findings=[finding(name, hint=name)], sections=[name])
    for shown in (text.render_checkpoint(ckpt), text.render_report(SampleReport(name)), text.render_markdown(SampleReport(name))):
        assert all(c.isprintable() or c == "\n" for c in shown)


def test_newline_in_a_name_adds_no_line() -> None:
    plain, broken = Sample({"a": (1,), "b": (1,)}), Sample({"a\nfake line": (1,), "b": (1,)})
    assert len(text.render_checkpoint(plain).splitlines()) == len(text.render_checkpoint(broken).splitlines())


def test_markdown_has_no_live_markup() -> None:
    shown = text.render_markdown(SampleReport(XSS))
    assert "<img" not in shown
    assert "&lt;img" in shown
    pipes = text.render_markdown(SampleReport("a|b")).splitlines()
    row = next(line for line in pipes if line.startswith("| a"))
    assert row.startswith("| a\\|b |")
    assert row.replace("\\|", "").count("|") == 8


def test_names_that_clash_with_groups_and_odd_dots() -> None:
    names = ["a", "a.b", "a..b", ".a", "a.", ".", "..", "layers.01.w", "layers.1.w", "x" * 500, ".".join("x" * 400)]
    ckpt = Sample(dict.fromkeys(names, (2,)))
    leaves = [leaf.name for leaf in outline.tree(ckpt, {}).leaves()]
    assert sorted(map(str, leaves)) == sorted(names)
    assert len(text.render_checkpoint(ckpt).splitlines()) > len(names)


def test_unequal_layers_do_not_fold_together() -> None:
    shapes = transformer(4)
    shapes["model.layers.2.norm.weight"] = (16,)
    labels = [line.label for line in outline.lines(outline.tree(Sample(shapes), {}))]
    assert "{0-1}" in labels
    assert "2" in labels
    assert "3" in labels


def test_layers_of_another_dtype_do_not_fold_together() -> None:
    ckpt = Sample(transformer(4))
    for name in list(ckpt):
        if ".3." in name:
            ckpt[name].dtype = "float16"
    labels = [line.label for line in outline.lines(outline.tree(ckpt, {}))]
    assert "{0-2}" in labels
    assert "3" in labels


def test_folding_counts_every_tensor_and_byte() -> None:
    shapes = {f"layers.{i}.experts.{j}.w{k}.weight": (4, 4) for i in range(6) for j in range(8) for k in range(3)}
    ckpt = Sample(shapes)
    rows = outline.lines(outline.tree(ckpt, {}))
    assert rows[0].count == len(shapes)
    assert rows[0].nbytes == sum(t.nbytes for t in ckpt.values())
    assert sum(row.times for row in rows if not row.group) == len(shapes)
    assert sum(row.times * row.nbytes for row in rows if not row.group) == rows[0].nbytes


def test_tied_bytes_count_once_and_the_tie_is_named() -> None:
    names = ["model.embed.weight", "model.head.weight"]
    shown = text.render_checkpoint(Sample(dict.fromkeys(names, (10,)), aliases={names[1]: names[0]}))
    assert shown.splitlines()[0] == "small.pt · 2 tensors · 40 B · float32"
    assert shown.splitlines()[2].endswith("[10]  float32 = model.embed.weight")


def test_layers_tied_to_the_first_fold_apart_from_it() -> None:
    shapes = {f"h.{i}.w": (5,) for i in range(6)}
    ckpt = Sample(shapes, aliases={f"h.{i}.w": "h.0.w" for i in range(1, 6)})
    rows = outline.lines(outline.tree(ckpt, ckpt.aliases))
    assert [(row.label, row.times, bool(row.tied)) for row in rows if not row.group] == [("0.w", 1, False), ("w", 5, True)]


def test_numbered_siblings_are_in_counting_order() -> None:
    ckpt = Sample({f"h.{i}.w": (i % 3 + 1,) for i in (10, 2, 1, 0, 9)})
    order = [leaf.name for leaf in outline.tree(ckpt, {}).leaves()]
    assert order == ["h.0.w", "h.1.w", "h.2.w", "h.9.w", "h.10.w"]


def test_empty_checkpoint() -> None:
    assert text.render_checkpoint(Sample({})) == f"small.pt · 0 tensors · {format_bytes(0)}"


def test_importing_text_loads_nothing_heavy() -> None:
    code = "import sys, workbench.render.text, workbench.render.html, workbench.render.plots; print(sorted({'torch', 'numpy', 'matplotlib', 'IPython'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

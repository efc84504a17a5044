"""The shape of the library, by its syntax trees and in fresh processes: who may import whom, what is never called, what starts fast."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import workbench
import workbench.tensors

ROOT = Path(workbench.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]

# a room may import only rooms of an earlier line, or of its own
ORDER = [
    {"errors", "dtypes"}, {"files", "remote"}, {"tensors", "names", "tables", "tree", "strided"}, {"render"}, {"report"}, {"sections"}, {"checkpoint"}, {"stream", "adapter_config"}, {"formats"}, {"opening"}, {"analyses"}, {"ops"}, {"keymap"},
    {"differ"}, {"verification"}, {"exporting"}, {"models"}, {"compression"}, {"training", "store"}, {"teaching"}, {"widgets", "cli"},
]  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

# siblings stay strangers; these modules are what a room shares
SHARED = {
    "formats": {
        "pickle_vm",
        "pickle_arguments",
        "pickle_loop",
        "dcp_template",
        "zip_index",
        "torch_objects",
        "torch_pickle",
        "torch_template",
        "torch_archive",
        "pickle_blobs",
        "window",
        "packed",
        "known_globals",
        "numpy_objects",
        "python_objects",
        "torch_states",
        "writing",
        "torch_kernels",
    },
    "analyses": set(),
    "ops": {"scope", "schemes"},
    "widgets": {"base", "jobs", "tensor_panel"},
}
FAMILIES = {  # one format in several files
    ("formats", "torch_legacy"): {"torch_zip"},
    ("formats", "exported_file"): {"torch_zip", "exported_graph"},
    ("formats", "exported_graph"): {"torchscript_file"},
    ("formats", "sharded"): {"safetensors_file"},
    ("formats", "onnx_file"): {"protobuf_wire"},
    ("formats", "folders"): {"sharded", "strangers"},
    ("formats", "dcp_folder"): {"torch_zip", "safetensors_file"},
    ("formats", "safetensors_writer"): {"safetensors_file"},
    ("formats", "gguf_writer"): {"gguf_file"},
    ("formats", "torch_writer"): {"torch_zip"},
    ("analyses", "scanner"): {"scan_report", "scan_marks", "scan_pickles", "pickle_runs"},
    ("analyses", "scan_pickles"): {"scan_report", "scan_marks", "pickle_runs"},
    ("analyses", "checkup"): {"scan_report", "scanner", "statistics", "sizes", "description"},
    ("widgets", "explorer"): {"explorer_report"},
    ("widgets", "compressor"): {"compressor_report"},
    ("widgets", "mapper"): {"mapper_report"},
    ("widgets", "netron"): {"netron_report"},
    ("widgets", "exporter"): {"exporter_report", "netron_report"},
}

HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "onnxscript", "fsspec", "gguf", "safetensors"}
FRONT_END = {"anywidget", "ipywidgets", "traitlets", "IPython"}
KERNELS = {"formats/torch_kernels.py", "keymap/formulas.py"}  # imported by name when a tensor is computed


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path, *, at_import_time=False):
    """(line, dotted name) of every import, outside TYPE_CHECKING; only those that run at import time where asked."""
    pending = [(node, False) for node in ast.parse(path.read_text()).body]
    while pending:
        node, inside = pending.pop()
        if is_type_checking(node) or (inside and at_import_time):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        pending += [
            (child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))) for child in ast.iter_child_nodes(node)
        ]


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_one_way(path):
    own = module_of(path)
    if not own or own[0] in ("__init__", "__main__"):
        return
    assert own[0] in RANK, f"{own[0]} is no room of the design"
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "workbench" or len(parts) < 2:
            continue
        room = parts[1]
        if room not in RANK:  # a name from the package itself
            continue
        assert (
            RANK[room] < RANK[own[0]]
            or room == own[0]
            or (RANK[room] == RANK[own[0]] and room not in ("widgets", "cli", "training", "store"))
        ), f"{path.name}:{line} imports {name}, which comes later"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if module_of(p)[:1] and module_of(p)[0] in SHARED and p.name != "__init__.py"],
    ids=lambda p: "/".join(module_of(p)),
)
def test_siblings_stay_strangers(path):
    room, own = module_of(path)[0], module_of(path)[-1]
    siblings = {p.stem for p in (ROOT / room).glob("*.py")} - {"__init__", own}
    for line, name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["workbench", room] and len(parts) > 2 and parts[2] in siblings:
            assert parts[2] in SHARED[room] | FAMILIES.get((room, own), set()), f"{path.name}:{line} imports its sibling {parts[2]}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_heavy_libraries_are_imported_where_they_are_needed(path):
    own = module_of(path)
    below = own and own[0] in RANK and RANK[own[0]] < RANK["verification"]
    for line, name in imports(path, at_import_time=True):
        top = name.split(".")[0]
        if below and path.relative_to(ROOT).as_posix() not in KERNELS:
            assert top not in HEAVY, f"{path.name}:{line} imports {top} when it is imported"
    for line, name in imports(path):
        top = name.split(".")[0]
        assert top != "matplotlib" or own[:1] == ("render",), f"{path.name}:{line}: matplotlib belongs to render"
        assert top not in FRONT_END or own[:1] == ("widgets",), f"{path.name}:{line}: {top} belongs to widgets"
        assert not name.startswith("matplotlib.pyplot"), f"{path.name}:{line}: figures are made without pyplot"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_prints_exits_or_runs_what_a_file_says(path):
    own = module_of(path)
    for node, name in calls(path):
        place = f"{path.name}:{node.lineno}"
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name != "print" or own == ("cli",), f"{place}: print belongs to cli"
        assert name not in ("sys.exit", "exit", "quit", "os._exit") or own in (("cli",), ("__main__",)), f"{place}: only cli exits"
        assert name not in (
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "eval",
            "exec",
            "os.system",
            "marshal.loads",
            "__import__",
        ), f"{place}: {name}"
        if name.endswith("torch.load"):
            assert keywords.get("weights_only") == "True", f"{place}: torch.load without weights_only=True"
        if name in ("torch.jit.load", "torch.export.load"):
            assert own[0] in ("exporting", "verification", "models"), f"{place}: {name} runs a program and belongs behind the trust rule"
        assert not name.startswith("subprocess.") or own[0] in ("teaching", "exporting", "verification"), f"{place}: {name}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_are_written_through_atomic_write_alone(path):
    own = module_of(path)
    if own and own[0] in ("files", "exporting", "teaching", "verification", "training", "store"):
        return
    for node, name in calls(path):
        place = f"{path.name}:{node.lineno}"
        assert name.rpartition(".")[2] not in ("write_text", "write_bytes", "unlink", "rmtree", "replace_file"), f"{place}: {name}"
        assert name != "open" or own[0] == "widgets", f"{place}: open() belongs to files"
        if name == "os.open":
            assert own == ("stream",), f"{place}: os.open belongs to files and the executor"


def test_kernels_are_named_inside_this_package_only():
    with pytest.raises(workbench.errors.SpecMismatchError):
        workbench.tensors.kernel("os:system")


def test_the_library_stays_small():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert sum(lines.values()) < 38_450
    assert not [f"{path.name}: {count}" for path, count in lines.items() if count > 600]


def test_every_module_says_what_it_is():
    assert not [str(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]


# fresh processes


def fresh(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("fresh") / "model.pt"
    torch.save({"model": torch.nn.Linear(3, 2).state_dict(), "epoch": 4}, path)
    return path


LISTING = {
    "import": "import workbench",
    "list, scan and rename": "import workbench as wb; c = wb.open(sys.argv[1]); list(c), c.dangers, str(c), c._repr_html_(), c.sections(), c.weights; c['model.weight'].peek(), c['model.weight'].raw(); wb.ops.rename(c, {'weight': 'w'})",
    "dry run of a conversion": "import workbench as wb; c = wb.ops.quantize(wb.open(sys.argv[1])); [t.spec for t in c.values()]",
    "ledger and match": "import workbench as wb; c = wb.open(sys.argv[1]); str(wb.ledger(c)), wb.match(c, c)",
    "scan, archive, describe, checkup of the index": "import workbench as wb; p = sys.argv[1]; str(wb.scan(p)), str(wb.archive(p)), str(wb.describe(p)), str(wb.checkup(p, values=False))",
    "copying save": "import workbench as wb; wb.save(wb.open(sys.argv[1]), sys.argv[1] + '.copy.pt')",
}


@pytest.mark.parametrize("what", LISTING)
def test_listing_imports_no_heavy_library(what, checkpoint):
    heavy = sorted((HEAVY | FRONT_END | {"matplotlib"}) - {"safetensors"})
    out = fresh(f"import sys\n{LISTING[what]}\nprint([m for m in {heavy} if m in sys.modules])", checkpoint)
    assert out.strip() == "[]"


def test_the_command_line_lists_as_json_without_heavy_imports(checkpoint):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "workbench", "inspect", str(checkpoint), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert {t["name"]: (t["shape"], t["dtype"]) for t in told["tensors"]} == {
        "model.weight": ([2, 3], "float32"),
        "model.bias": ([2], "float32"),
    }
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert not imported & (HEAVY | FRONT_END | {"matplotlib"})


@pytest.mark.parametrize(("content", "code"), [(b"no checkpoint", 2), (None, 2)])
def test_the_command_line_tells_a_bad_file_by_its_exit_code(content, code, tmp_path):
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    for extra in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "workbench", "inspect", str(path), *extra], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert "x.pt" in (json.loads(done.stdout)["error"] if extra else done.stderr)


CALLS_TWICE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, workbench as wb
model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
x = torch.ones(1, 3)
folder = sys.argv[1]
torch.save(model.state_dict(), folder + "/m.pt")
uses = {
    "open": lambda: wb.open(model), "save": lambda: wb.save(model, folder + "/m.pt"), "stats": lambda: wb.stats(model), "ledger": lambda: wb.ledger(model), "sparsity": lambda: wb.sparsity(model, zstd=None), "diff": lambda: wb.diff(model, model),
    "match": lambda: wb.match(model, model), "load_into": lambda: wb.load_into(model, model.state_dict()), "compare": lambda: callable(wb.compare) or 1 / 0, "parity": lambda: wb.parity(model, model, x),
    "export_model": lambda: callable(wb.export_model) or 1 / 0, "Checkpoint": lambda: wb.Checkpoint({}), "ops": lambda: wb.ops.cast(wb.open(model), "float16"), "errors": lambda: wb.errors.WorkbenchError("x"),
    "widgets": lambda: wb.widgets.register, "models": lambda: wb.models.__doc__, "training": lambda: wb.training.__doc__, "store": lambda: wb.store.__doc__, "teaching": lambda: wb.teaching.__doc__,
    "scan": lambda: wb.scan(folder + "/m.pt"), "checkup": lambda: wb.checkup(model), "Workbench": lambda: wb.Workbench,
    "archive": lambda: wb.archive(folder + "/m.pt"), "describe": lambda: wb.describe(model),
}
for name in wb.__all__:
    for _ in range(2):
        if name in uses:
            uses[name]()
        else:
            getattr(wb, name)
import importlib, pkgutil
for found in pkgutil.walk_packages(wb.__path__, "workbench."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
shadowed = [name for name in wb._FACE if type(getattr(wb, name)).__name__ == "module"]
print(shadowed)
for name in wb.__all__:
    if name in uses:
        uses[name]()
"""


def test_every_public_name_works_twice_and_after_every_submodule_was_imported(tmp_path):
    assert fresh(CALLS_TWICE, tmp_path).strip().splitlines()[-1] == "[]"


def test_the_slide_lists_what_there_is():
    assert sorted(workbench.__all__) == dir(workbench)
    assert all(getattr(workbench, name).__doc__ for name in workbench.__all__)

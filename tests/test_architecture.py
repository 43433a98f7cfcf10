"""The house stays in order: who imports whom, and that the halves are twins."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a package may import, besides the standard library and itself.
ALLOWED = {
    "modelspec": {"numpy", "safetensors", "h5py", "PIL", "huggingface_hub"},
    "neighborhood": {"numpy"},
    "tfmodels": {"modelspec", "neighborhood", "keras", "tensorflow", "numpy", "optree", "safetensors"},
    "ptmodels": {"modelspec", "neighborhood", "torch", "numpy", "safetensors"},
    "parity": {
        *("modelspec", "neighborhood", "tfmodels", "ptmodels", "keras", "tensorflow", "torch"),
        *("numpy", "rich", "jinja2", "markupsafe", "PIL", "skimage"),
    },
    "twinzoo": {
        *("modelspec", "neighborhood", "tfmodels", "ptmodels", "parity", "keras", "tensorflow", "torch"),
        *("numpy", "rich", "PIL", "matplotlib"),
    },
}
# An image processor returns the tensors of the framework that its caller asks for, and only then imports it; exporters
# and runtimes likewise.
ON_REQUEST = {
    Path("modelspec/images/processor.py"): {"torch", "tensorflow"},
    Path("ptmodels/natten_compat.py"): {"natten"},  # which it completes where it is installed
    Path("modelspec/exports/onnx_file.py"): {"onnx"},
    Path("modelspec/exports/metadata.py"): {"onnx", "google"},  # google.protobuf, which onnx needs
    Path("modelspec/exports/run_artefact.py"): {
        "tensorflow",
        "keras",
        "tfmodels",
        "torch",
        "onnxruntime",
        "ai_edge_litert",
    },
    Path("tfmodels/artefacts.py"): {"tf2onnx"},
    Path("twinzoo/finetuning.py"): {"sklearn"},
    Path("twinzoo/tensorboard_log.py"): {"tensorboard"},
    Path("twinzoo/training_commands.py"): {"sklearn"},
    Path("twinzoo/probing.py"): {"sklearn"},
}
PACKAGES = [name for name in ALLOWED if (ROOT / name).is_dir()]


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> dict[str, bool]:
    """The top-level packages that a file imports, wherever in it -> whether only inside functions."""
    found = {}

    def visit(node, inside):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module]
        else:
            names = []
        for name in names:
            top = name.partition(".")[0]
            found[top] = found.get(top, True) and inside
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return {name: inside for name, inside in found.items() if name not in sys.stdlib_module_names}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_stands_above_them(package):
    for path in python_files(package):
        relative = path.relative_to(ROOT)
        for name, inside in imports(path).items():
            allowed = name in ALLOWED[package] | {package} or (inside and name in ON_REQUEST.get(relative, ()))
            assert allowed, f"{relative} imports {name}, which {package} may not"


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("modelspec", {"torch", "tensorflow", "keras"}),
        ("neighborhood.reference", {"torch", "tensorflow", "keras", "modelspec"}),
        ("neighborhood.native", {"torch", "tensorflow", "keras", "modelspec"}),
        ("ptmodels", {"tensorflow", "keras"}),
        ("tfmodels", {"torch"}),
        ("parity.__main__", {"torch", "tensorflow", "keras", "skimage"}),
        ("twinzoo.plots", {"torch", "tensorflow", "keras"}),
    ],
)
def test_importing_one_half_leaves_the_other_alone(package, absent):
    code = f"import sys, {package}; print(*sorted({absent!r} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == ""


def test_importing_the_torch_half_leaves_the_compiler_alone():
    # it takes several times as long as all of the half
    code = "import sys, torch; before = set(sys.modules); import ptmodels; print(*set(sys.modules) - before)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.partition(".")[0] for name in process.stdout.split() if not name.startswith("torch.")}
    assert "ptmodels" in loaded and "sympy" not in loaded
    assert not [name for name in process.stdout.split() if name.startswith(("torch._dynamo", "torch._inductor"))]


def test_no_file_is_named_after_nothing():
    vague = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for package in (*PACKAGES, "tests") for path in python_files(package) if path.name in vague]


def test_families_are_read_in_one_sitting():
    for half in ("tfmodels", "ptmodels"):
        for name in ("nat.py", "swiftformer.py", "vit_msn.py"):
            lines = (ROOT / half / name).read_text(encoding="utf-8").splitlines()
            assert 200 <= len(lines) <= 450, f"{half}/{name} has {len(lines)} lines"


# The pair rule

FAMILIES = ["dinat.py", "nat.py", "swiftformer.py", "vit_msn.py"]
TWINS = sorted({path.name for path in python_files("tfmodels")} & {path.name for path in python_files("ptmodels")})


def classes(half: str, name: str) -> dict[str, ast.ClassDef]:
    """Classes in their order, without the prefix TF."""
    module = ast.parse((ROOT / half / name).read_text(encoding="utf-8"))
    return {re.sub("^TF", "", node.name): node for node in module.body if isinstance(node, ast.ClassDef)}


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    found = {entry.name: entry for entry in node.body if isinstance(entry, ast.FunctionDef)}
    return {{"call": "forward"}.get(name, name): entry for name, entry in found.items()}


def arguments(function: ast.FunctionDef) -> list[str]:
    """Argument names; `training`, which torch keeps on the module, and `**kwargs` for Keras are no difference."""
    names = [argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]]
    return [name for name in names if name not in ("self", "training")]


def attributes(node: ast.ClassDef) -> list[str]:
    """Names that the constructor assigns to self, in order."""
    names = []
    for entry in ast.walk(methods(node)["__init__"]) if "__init__" in methods(node) else ():
        targets = entry.targets if isinstance(entry, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                names.append((entry.lineno, target.attr))
    # Keras' own flag, set where a layer has made its weights
    return list(dict.fromkeys(name for _, name in sorted(names) if name != "built"))


@pytest.mark.parametrize("name", FAMILIES)
def test_twins_have_the_same_classes_in_the_same_order(name):
    assert list(classes("tfmodels", name)) == list(classes("ptmodels", name))


@pytest.mark.parametrize("name", FAMILIES)
def test_twin_classes_have_the_same_methods_arguments_and_attributes(name):
    keras, torch = classes("tfmodels", name), classes("ptmodels", name)
    for class_name, node in keras.items():
        ours, theirs = methods(node), methods(torch[class_name])
        assert list(ours) == list(theirs), class_name
        for method in ours:
            if method != "forward" or class_name.endswith(("Model", "ForImageClassification")):
                assert arguments(ours[method]) == arguments(theirs[method]), f"{class_name}.{method}"
        assert attributes(node) == attributes(torch[class_name]), class_name


@pytest.mark.parametrize("name", [name for name in TWINS if name not in FAMILIES])
def test_what_both_files_define_has_the_same_arguments(name):
    def functions(half):
        module = ast.parse((ROOT / half / name).read_text(encoding="utf-8"))
        return {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}

    keras, torch = functions("tfmodels"), functions("ptmodels")
    for shared in keras.keys() & torch.keys():
        ours = arguments(keras[shared])
        assert ours[: len(arguments(torch[shared]))] == arguments(torch[shared]), f"{name}: {shared}"
    both = classes("tfmodels", name).keys() & classes("ptmodels", name).keys()
    assert name not in ("layers.py", "pretrained.py") or both


def test_what_both_halves_export_is_one_object():
    import ptmodels
    import tfmodels

    shared = set(ptmodels.__all__) & set(tfmodels.__all__) - {"create_model", "load"}
    assert {"SwiftFormerConfig", "ViTMSNConfig", "NatConfig", "DinatConfig", "AutoImageProcessor"} <= shared
    for name in shared:
        assert getattr(ptmodels, name) is getattr(tfmodels, name), name
    assert {re.sub("^TF", "", name) for name in tfmodels.__all__} == set(ptmodels.__all__)

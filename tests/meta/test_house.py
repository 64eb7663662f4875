"""The package's own rules: imports point down only, hosts come in where they belong, their private names by a list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_init"

# From the bottom up. A file may import its own package and what lies strictly below.
FLOORS = [
    {"native", "checks", "findings", "sandbox"},
    {"distributed"},
    {"schemes"},
    {"introspect"},
    {"initialization", "monitor"},
    {"show"},
    {"callbacks"},
    {"cli"},
    {"__init__"},
]
NO_LIGHTNING = frozenset().union(*FLOORS[:6])


def imports_of(file: Path) -> Iterator[tuple[str, str]]:
    """Every (module, name) a file imports, also inside functions and under TYPE_CHECKING; name may be empty."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.relative_to(ROOT)}: relative imports hide where they point"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports_of(file: Path) -> set[Path]:
    """The files of this package that a file imports."""
    found = set()
    for module, name in imports_of(file):
        if module.partition(".")[0] != "lightning_init":
            continue
        path = ROOT.joinpath(*module.split("."))
        targets = (path / f"{name}.py", path / f"{name}.pyi", path.with_suffix(".py"), path / "__init__.py")
        found.add(next(target for target in targets if target.is_file()))
    return found


def top(file: Path) -> str:
    """``initialization`` for lightning_init/initialization/fans.py, ``cli`` for lightning_init/cli.py."""
    return file.relative_to(PACKAGE).parts[0].partition(".")[0]


def floor(file: Path) -> int:
    """How high a file stands in :data:`FLOORS`."""
    places = [number for number, names in enumerate(FLOORS) if top(file) in names]
    assert places, f"{file.relative_to(ROOT)} has no floor yet: give it one in FLOORS"
    return places[0]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    wrong = [
        str(other.relative_to(ROOT))
        for other in own_imports_of(file)
        if top(other) != top(file) and floor(other) >= floor(file)
    ]
    assert not wrong, f"{file.relative_to(ROOT)} must not import {wrong}"


def test_no_file_imports_itself_through_others() -> None:
    graph = {file: own_imports_of(file) for file in FILES}
    assert set(TopologicalSorter(graph).static_order()) >= set(FILES)  # a cycle raises CycleError


@pytest.mark.parametrize(
    "file", [file for file in FILES if top(file) in NO_LIGHTNING], ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_mathematics_knows_no_lightning(file: Path) -> None:
    hosts = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
    assert not hosts & {module.partition(".")[0] for module, _ in imports_of(file)}


def test_lightning_is_imported_under_one_name() -> None:
    """Whoever uses the other would wait for both. Its classes are found where a user has imported it."""
    packages = {module.partition(".")[0] for file in FILES for module, _ in imports_of(file)}
    assert not packages & {"pytorch_lightning", "lightning_fabric"}


def test_matplotlib_is_imported_only_where_a_picture_is_drawn() -> None:
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "matplotlib" not in ast.unparse(node), f"{file.relative_to(ROOT)}: move it into the function"


OTHERS_PRIVATE_NAMES: dict[str, dict[str, str]] = {
    "initialization/copies.py": {
        "_trainer": "an attribute of every LightningModule that leads to data and loggers: not to be looked into",
        "_fabric": "the same of Lightning Fabric",
    },
    "callbacks/_lightning.py": {
        "_apply": "the only way to replace what is on the meta device, ties kept",
        "_data_source": "the user's train_dataloader before the Trainer has made its own",
        "_on_before_batch_transfer": "how the Trainer runs the user's hook",
        "_batches_that_stepped": "what LearningRateMonitor counts by; global_step counts every optimizer",
        "_current_fx_name": "tells training_step from validation and other callbacks",
        "_should_accumulate": "the only answer that knows of the shorter last accumulation of an epoch",
        "_step_supports_amp_scaling": "how Lightning itself asks whether an optimizer unscales",
    },
    "cli/init_cli.py": {
        "_actions": "argparse has no public list of a parser's arguments",
        "_get": "LightningCLI's own way to a key below the subcommand",
        "_parser": "LightningCLI's own way to the subcommand's parser",
    },
    "initialization/survey.py": {
        "_orig": "how pruning and the older spectral_norm end the name of what they compute from",
        "_OrthMaps": "tells the orthogonal maps that can be inverted",
        "_reset_parameters": "multi-head attention's own reset",
        "_version": "tells memory that nothing was written to",
    },
    "initialization/training_signs.py": {"_version": "tells how often a parameter was written to"},
    "initialization/write.py": {"_SpectralNorm": "the class that spectral_norm registers has no public name"},
    "introspect/names.py": {
        "_checkpoint_wrapped_module": "activation checkpointing's wrapper",
        "_fsdp_wrapped_module": "FSDP1's wrapper",
        "_modules": "looks up one child without copying its siblings: names are asked thousands of times",
        "_orig_mod": "torch.compile's wrapper",
        "_FabricModule": "Fabric's wrapper, by name, so that Lightning need not be imported",
        "_forward_module": "where it keeps what it wraps",
        "_original_module": "the same",
    },
    "initialization/one_pass.py": {"_ConvNd": "the base of all convolutions"},
    "introspect/module_order.py": {
        "_AdaptiveAvgPoolNd": "the base of modules that let every signal pass, as the other three",
        "_AvgPoolNd": "the same",
        "_ConstantPadNd": "the same",
        "_DropoutNd": "the same",
        "_ConvNd": "the base of all convolutions",
        "_NormBase": "the base of batch and instance norms",
    },
    "introspect/operations.py": {
        "_local_tensor": "the memory of a DTensor; its public to_local makes a new tensor that autograd knows",
        "_cdata": "which memory a tensor is in, whatever object it comes as",
        "torch.utils._python_dispatch": "home of TorchDispatchMode, which has no public one",
        "torch.utils._pytree": "tensors in nested arguments, as torch itself finds them",
    },
    "introspect/probe.py": {
        "_DropoutNd": "the base of all dropouts",
        "_schema": "which arguments an operation overwrites",
        "torch.utils._python_dispatch": "home of TorchDispatchMode, which has no public one",
    },
    "introspect/own_code.py": {
        "_ConvNd": "the base of all convolutions",
        "_ConvTransposeNd": "the base of the three transposed convolutions",
    },
    "introspect/sites.py": {
        "_forward_pre_hooks": "the older weight_norm, spectral_norm and pruning are found in no other place",
        "_tensor_name": "which parameter a pruning method prunes",
    },
    "introspect/torch_roles.py": {"_ConvTransposeNd": "the base of the three transposed convolutions"},
    "introspect/unit_rules.py": {
        "_BatchNorm": "the base of all batch norms",
        "_ConvNd": "the base of all convolutions",
    },
    "monitor/autograd.py": {
        "_C": "home of what follows",
        "_autograd": "the same",
        "_current_autograd_node": "which operation runs backward",
        "_current_graph_task_id": "tells one backward pass from another",
        "_get_current_graph_task_keep_graph": "whether another backward pass may follow",
        "_sequence_nr": "tells an operation from others without keeping it alive",
        "_will_engine_execute_node": "whether a backward pass is that of a loss",
    },
    "monitor/origins.py": {
        "_input_metadata": "the shape of an operation's result",
        "_saved_dim": "what was selected",
        "_saved_dim0": "what was transposed",
        "_saved_dim1": "the same",
        "_saved_dims": "how dimensions were permuted",
        "_sequence_nr": "tells an operation from others without keeping it alive",
    },
    "monitor/observe.py": {"_version": "tells whether a gradient was written to"},
    "monitor/collector.py": {
        "_C": "home of the one below",
        "torch._C._functorch": "the only home of what tells tensors inside of torch.func",
        "_base": "tells a view from its base",
        "_forward_hooks": "tells whether somebody else may change what a module returns",
        "_forward_pre_hooks": "likewise",
        "_get_tracing_state": "tells whether torch.jit.trace records, without an import",
    },
    "introspect/layers.py": {
        "_parameters": "compared on every logged step, and named_parameters takes ten times as long",
        "_compiled_call_impl": "what tells a module that was compiled in place",
        "torch._dynamo": "only in sys.modules: home of OptimizedModule",
    },
    "monitor/eager.py": {
        "torch._dynamo": "only in sys.modules: whether anything can have been compiled",
        "_torchdynamo_orig_callable": "what a function was compiled from",
    },
    "monitor/units.py": {
        "_version": "tells whether a tensor was changed in place since",
        "_input_metadata": "how many dimensions an operation's result has",
        "_sequence_nr": "tells an operation from others without keeping it alive",
        "torch._subclasses.fake_tensor": "tells the tensors that stand for others while a model is exported",
        "torch._C._functorch": "tells tensors inside torch.func, whose elements cannot be read",
    },
    "sandbox.py": {
        "_hooks": "how the names of all of a module's dictionaries of hooks end",
        "_parameters": "replaced by zeros that are no parameters, of whatever shape",
        "_buffers": "the same",
        "_version": "tells whether a tensor was changed in place since",
    },
    "show/event_file.py": {
        "_async_writer": "the way from a SummaryWriter to its file",
        "_record_writer": "the same",
        "_worker": "the same",
        "_writer": "the same",
    },
    "show/loggers.py": {
        "_get_file_writer": "the way from a SummaryWriter to its file",
        "_prefix": "what a logger of Lightning's puts before every tag",
    },
}
"""The only files that use private names of torch, Lightning and TensorBoard, which names, and why. Keep it short."""


def names_made_in(files: list[Path]) -> set[str]:
    """Every name that these files define: functions, classes, variables and attributes."""
    made = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                made.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                made.add(node.attr)
    return made


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1 and name.isidentifier()


HOSTS = ("torch", "lightning", "tensorboard", "jsonargparse")


def private_names_of_others(file: Path, own: set[str]) -> set[str]:
    """Private modules and names that a file imports, reaches for as attributes, or has as text (for ``getattr``)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_init"):
            if any(map(is_private, (node.module or "").split("."))):
                found.add(node.module or "")
            found |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 2:
            found.add(node.value)  # for getattr
    of_named_tuples = {"_replace", "_asdict"}  # public, whatever they look like
    of_modules = set(dir(nn.Module()))  # torch's, even if a class here has an attribute of the same name
    own = (own - of_modules) | of_named_tuples
    others = {name for name in found - own if "." not in name or name.partition(".")[0] in HOSTS}
    return {name for name in others if any(map(is_private, name.split(".")))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_names_of_others_are_used_only_where_a_reason_is_given(file: Path) -> None:
    names = private_names_of_others(file, names_made_in(FILES))
    assert names == set(OTHERS_PRIVATE_NAMES.get(str(file.relative_to(PACKAGE)), {}))


def test_private_names_are_found_wherever_they_hide(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import torch._dynamo\n"
        "from torch.nn.modules.conv import _ConvNd\n"
        "from torch._utils import public\n"
        "from lightning_init.sandbox import _own\n"
        "import torch.nn, torch.__future__\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        self._modules = {}\n"  # torch's
        "        self._mine = self._get_name()\n"
        "        getattr(trainer.__dict__, '_callback_connector')._replace(x=1)\n"
    )
    found = private_names_of_others(file, names_made_in([file]))
    assert found == {"torch._dynamo", "_ConvNd", "torch._utils", "_modules", "_get_name", "_callback_connector"}

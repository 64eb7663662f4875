"""One seed, one set of weights: on any number of processes and threads, sharded in any way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_init import InitCallback, Rule, initialize
from lightning_init.initialization.streams import BLOCK, Block
from tests.support.models import (
    AllKinds,
    Authored,
    Digits,
    DigitsModule,
    LateModule,
    Sharded,
    ShardedModule,
    WholeModel,
    digits,
    mlp,
)
from tests.support.namespaces import LIGHTNING, PYTORCH_LIGHTNING, Namespace, module_class
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer, make_fsdp2_trainer, make_trainer
from tests.support.weights import Weights, WeightsAtStart, assert_differ, assert_same, weights_of

SEED = 7


def wide_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 4098), nn.ReLU(), nn.Linear(4098, 65), nn.ReLU(), nn.Linear(65, 10))


class TensorParallelModule(ShardedModule):
    """The first two Linear layers over the second dimension of the mesh, then FSDP2 over the first."""

    def parallelize(self) -> None:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)
        super().parallelize()


def weights_at_start(model: DigitsModule, callback: InitCallback, trainer: Any, **options: Any) -> Weights:
    seen = WeightsAtStart()
    trainer(callbacks=[callback, seen], max_steps=1, limit_val_batches=0, **options).fit(model)
    return {name.removeprefix("network."): weight for name, weight in seen.at_start.items()}


def start_with(strategy: str, build: Any = AllKinds, namespace: Namespace = LIGHTNING, **options: Any) -> Weights:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # plain DDP has a different one per rank
    callback = InitCallback("he_normal", seed=SEED)
    options["namespace"] = namespace
    if strategy == "ddp":
        return weights_at_start(module_class(Digits, namespace)(build), callback, make_ddp_trainer, **options)
    if strategy == "fsdp2":
        return weights_at_start(module_class(Sharded, namespace)(build), callback, make_fsdp2_trainer, **options)
    if strategy == "fsdp2 meta":
        return weights_at_start(ShardedModule(build, "meta"), callback, make_fsdp2_trainer, **options)
    if strategy == "tensor parallel":
        model = TensorParallelModule(build)
        trainer = partial(make_fsdp2_trainer, tensor_parallel_size=2)
        weights = weights_at_start(model, callback, trainer, **options)
        placements = model.network[0].weight.placements
        assert len(placements) == 2, placements
        assert not any(isinstance(p, Replicate) for p in placements), placements
        return weights
    return weights_at_start(DigitsModule(build), callback, make_trainer, **options)


@pytest.fixture(scope="module")
def expected() -> Weights:
    """What one process without Lightning draws. Its names have no prefix: they are the LightningModule's."""
    return initialized(AllKinds())


def initialized(network: nn.Module) -> Weights:
    """The seed's weights for the network as a LightningModule's ``network``."""
    owner = DigitsModule(lambda: network)
    initialize(owner, "he_normal", seed=SEED, batch=digits()[0][:32])
    return weights_of(network)


def test_weight_matrices_are_all_drawn(expected: Weights) -> None:
    torch.manual_seed(0)
    assert_differ(weights_of(AllKinds()), expected)
    assert sum(weight.ndim >= 2 for weight in expected.values()) > 20


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [("single", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2 meta", 2)],
)
@pytest.mark.filterwarnings("ignore:Parameter initialization incomplete:UserWarning")  # attention on meta: Lightning
def test_same_weights_on_any_number_of_ranks(strategy: str, world_size: int, expected: Weights) -> None:
    for weights in run_ranks(start_with, world_size, strategy):
        assert_same(weights, expected)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_same_weights_on_ranks_of_pytorch_lightning(strategy: str, expected: Weights) -> None:
    for weights in run_ranks(start_with, 2, strategy, namespace=PYTORCH_LIGHTNING):
        assert_same(weights, expected)


def authored(strategy: str) -> tuple[Weights, dict[str, str]]:
    """The weights at the start of a fit whose ranks drew an author's values of their own, and what was left alone."""
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
    callback = InitCallback("he_normal", seed=SEED)
    module, trainer = {
        "single": (DigitsModule, make_trainer),
        "ddp": (DigitsModule, make_ddp_trainer),
        "fsdp2": (ShardedModule, make_fsdp2_trainer),
    }[strategy]
    weights = weights_at_start(module(Authored), callback, trainer)
    assert callback.report is not None
    callback.report.check()
    return weights, {entry.name: entry.reason for entry in callback.report.left_alone}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # nothing in-place
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_what_the_author_meant_is_agreed_by_all_ranks(strategy: str, world_size: int) -> None:
    """Each rank has an author's draw of its own; a scale is read as the number that was meant."""
    expected, left = authored("single")
    assert set(left) == {f"network.{name}" for name in ("gate.weight", "gate.bias", "head.weight", "head.bias")} - {
        "network.gate.bias"  # 0, as it would be drawn
    }
    del expected["head.weight"]  # tiny on purpose, so it stays, and every rank had its own
    for weights, theirs in run_ranks(authored, world_size, strategy):
        assert theirs == left
        del weights["head.weight"]
        assert_same(weights, expected)
    assert expected["words.weight"].std().item() == pytest.approx(0.02, rel=0.2)


def trained_in_its_first_half() -> Weights:
    """A sign of training that only the first rank's shard shows, beside what an author of a fresh model may mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
        model[1].weight[:8] += torch.linspace(-0.1, 0.1, 8)
        model[1].bias[:8] += torch.linspace(-0.1, 0.1, 8)
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    initialize(model, "he_normal", seed=SEED)
    return weights_of(model)


def whole_model(strategy: str, scheme: Any) -> tuple[Weights, dict[str, str | None]]:
    """The weights at the start of a fit whose ranks drew an author's values of their own, and what decided on each."""
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
    callback = InitCallback(scheme, seed=SEED)
    module, trainer = {
        "single": (DigitsModule, make_trainer),
        "ddp": (DigitsModule, make_ddp_trainer),
        "fsdp2": (ShardedModule, make_fsdp2_trainer),
        "fsdp2 meta": (partial(ShardedModule, device="meta"), make_fsdp2_trainer),
    }[strategy]
    weights = weights_at_start(module(WholeModel), callback, trainer)
    assert callback.report is not None
    callback.report.check()
    for entry in callback.report.left_alone:  # as it was, and every rank had its own
        weights.pop(entry.name.removeprefix("network."), None)
    assert len(weights) > 8
    return weights, {entry.name: entry.decided_by for entry in callback.report.entries}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # nothing in-place
@pytest.mark.filterwarnings("ignore:only .* of the weights:UserWarning")
@pytest.mark.parametrize("scheme", ["he_normal", "torch_default", "auto"])
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_scales_that_the_whole_model_tells_are_agreed_by_all_ranks(strategy: str, world_size: int, scheme: str) -> None:
    expected, decided_by = whole_model("single", scheme)
    assert decided_by["network.writer.weight"] == "added to a table"
    assert ("own.matrix" in expected) == (scheme == "torch_default")
    for weights, theirs in run_ranks(whole_model, world_size, strategy, scheme):
        assert theirs == decided_by
        assert_same(weights, expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("scheme", ["torch_default", "auto"])
def test_whole_model_from_meta_has_the_same_weights_on_any_number_of_ranks(scheme: str) -> None:
    """Its author's draws are lost on the meta device: what each module's own reset says is left."""
    (expected, decided_by), *_ = run_ranks(whole_model, 1, "fsdp2 meta", scheme)
    for weights, theirs in run_ranks(whole_model, 2, "fsdp2 meta", scheme):
        assert theirs == decided_by
        assert_same(weights, expected)


def calibrated(strategy: str) -> tuple[Weights, Weights]:
    """The weights with and without calibration."""
    module, trainer = {
        "ddp": (DigitsModule, make_ddp_trainer),
        "fsdp2": (ShardedModule, make_fsdp2_trainer),
        "fsdp2 meta": (partial(ShardedModule, device="meta"), make_fsdp2_trainer),
    }[strategy]
    found = []
    for calibrate in (True, False):
        torch.manual_seed(dist.get_rank())
        callback = InitCallback("auto", seed=SEED, calibrate=calibrate)
        found.append(weights_at_start(module(partial(mlp, 32, 8)), callback, trainer))
        assert callback.report is not None
        callback.report.check()
    return found[0], found[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2 meta"])
def test_calibrated_weights_are_the_same_bits_on_all_ranks(strategy: str) -> None:
    """Each rank measures a batch of its own; what they write is one weight."""
    (first, plain), *others = run_ranks(calibrated, 2, strategy)
    for other, _ in others:
        assert_same(other, first)
    ratios = [float((first[name] / plain[name]).median()) for name in first if name.endswith("weight")]
    assert sum(abs(ratio - 1) > 0.01 for ratio in ratios) > 4


def test_signs_of_one_ranks_shard_count_for_all() -> None:
    """Where a model was trained, structure is no purpose: every rank draws the identity over, or none."""
    expected = trained_in_its_first_half()
    assert not torch.equal(expected["0.weight"], torch.eye(16))
    for weights in run_ranks(trained_in_its_first_half, 2):
        assert_same(weights, expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")  # nothing in-place
def test_same_weights_on_a_mesh_of_two_dimensions() -> None:
    expected = initialized(wide_mlp())
    for weights in run_ranks(start_with, 4, "tensor parallel", wide_mlp):
        assert_same(weights, expected)


def fsdp1_weights() -> Weights:
    torch.manual_seed(dist.get_rank())
    shard = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    network = AllKinds()
    network.wide = shard(network.wide)
    owner = DigitsModule(lambda: shard(network))  # a wrapper within a wrapper within the user's module
    initialize(owner, "he_normal", seed=SEED, batch=digits()[0][:32])
    with FullyShardedDataParallel.summon_full_params(owner):
        weights = weights_of(owner)
    names = (name.replace("_fsdp_wrapped_module.", "").removeprefix("network.") for name in weights)
    return dict(zip(names, weights.values(), strict=True))


def test_fsdp1_has_the_weights_of_what_is_not_traced() -> None:
    network = AllKinds()
    initialize(DigitsModule(lambda: network), "he_normal", seed=SEED)
    expected = weights_of(network)
    for weights in run_ranks(fsdp1_weights, 2):
        assert_same(weights, expected)


def placed(shape: tuple[int, int], dim: int) -> torch.Tensor:
    """A Linear's weight, initialised while sharded along ``dim``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(name: str, module: nn.Module, mesh: Any) -> None:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(dim)]))

    layer = distribute_module(nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)), mesh, shard)
    initialize(layer, "he_normal", seed=SEED)
    return weights_of(layer)["0.weight"]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (777, 1011)], ids=str)
def test_same_weights_for_uneven_shards_of_any_dimension(shape: tuple[int, int], dim: int) -> None:
    layer = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    initialize(layer, "he_normal", seed=SEED)
    for weight in run_ranks(placed, 2, shape, dim):
        assert torch.equal(weight, layer[0].weight)


def blocks_drawn(dim: int) -> list[int]:
    drawn = []
    draw = Block.draw

    def counted(block: Block, *args: Any, **options: Any) -> torch.Tensor:
        if len(block) == BLOCK:  # shorter ones are drawn to compare streams between ranks
            drawn.append(block.number)
        return draw(block, *args, **options)

    Block.draw = counted
    placed((4 * BLOCK // 64, 64), dim)
    return sorted(drawn)


def test_blocks_drawn_by_a_rank_are_those_of_its_rows() -> None:
    assert run_ranks(blocks_drawn, 2, 0) == [[0, 1], [2, 3]]
    assert run_ranks(blocks_drawn, 3, 0) == [[0, 1], [1, 2], [2, 3]]
    assert run_ranks(blocks_drawn, 2, 1) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_registration_order_does_not_matter(expected: Weights) -> None:
    assert_same(start_with("single", partial(AllKinds, reverse=True)), expected)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["he_normal", "truncated_normal", "orthogonal"])
def test_thread_number_does_not_matter(threads: int, scheme: str) -> None:
    (weights,) = run_ranks(weights_on_threads, 1, scheme, threads=threads)
    assert_same(weights, weights_on_threads(scheme))


def weights_on_threads(scheme: str) -> Weights:
    network = mlp(1031, 2)
    initialize(network, scheme, seed=SEED)
    return weights_of(network)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo itself
def test_compiled_model_has_the_same_weights(expected: Weights) -> None:
    compiled = DigitsModule(lambda: torch.compile(AllKinds(), backend="eager"))  # type: ignore[return-value]
    weights = weights_at_start(compiled, InitCallback("he_normal", seed=SEED), make_trainer)
    assert all(name.startswith("_orig_mod.") for name in weights)
    assert_same({name.removeprefix("_orig_mod."): weight for name, weight in weights.items()}, expected)


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2)])
def test_bfloat16_weights_are_the_rounded_ones(strategy: str, world_size: int, expected: Weights) -> None:
    rounded = {name: weight.bfloat16() for name, weight in expected.items()}
    for weights in run_ranks(start_with, world_size, strategy, precision="bf16-true"):
        assert_same(weights, rounded)


def late_weights() -> Weights:
    return weights_at_start(LateModule(AllKinds), InitCallback("he_normal", seed=SEED), make_ddp_trainer)


def test_configure_model_layers_are_initialized(expected: Weights) -> None:
    for weights in run_ranks(late_weights, 2):
        assert_same(weights, expected)


def seeded_by(seed: int | None, torch_seed: int | None = 0) -> Weights:
    if seed is not None:
        seed_everything(seed, verbose=False)
    if torch_seed is None:
        torch.seed()  # as in a process that has just started: forked ones have their parent's
    else:
        torch.manual_seed(torch_seed + dist.get_rank())
    return weights_at_start(DigitsModule(mlp), InitCallback("he_normal"), make_ddp_trainer)


def test_seed_of_seed_everything_is_used() -> None:
    on_0, on_1 = run_ranks(seeded_by, 2, SEED)
    assert_same(on_0, initialized(mlp()))
    assert_same(on_1, on_0)


def test_seed_is_agreed_on_by_ranks_and_differs_between_runs() -> None:
    on_0, on_1 = run_ranks(seeded_by, 2, None, None)
    assert_same(on_1, on_0)
    again, _ = run_ranks(seeded_by, 2, None, None)
    assert_differ(again, on_0)


def test_seed_of_torch_is_used_where_there_is_no_other() -> None:
    on_0, on_1 = run_ranks(seeded_by, 2, None, SEED)
    assert_same(on_0, initialized(mlp()))
    assert_same(on_1, on_0)


def generator_before_and_after(strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    states = {}

    class Watched(InitCallback):
        def on_fit_start(self, *args: Any) -> None:
            states["before"] = torch.get_rng_state()
            super().on_fit_start(*args)
            states["after"] = torch.get_rng_state()

    model, trainer = (
        (ShardedModule(AllKinds), make_fsdp2_trainer)
        if strategy == "fsdp2"
        else (DigitsModule(AllKinds), make_ddp_trainer)
    )
    weights_at_start(model, Watched(), trainer)
    return states["before"], states["after"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_global_generator_is_not_changed(strategy: str) -> None:
    for before, after in run_ranks(generator_before_and_after, 2, strategy):
        assert torch.equal(before, after)


def differ_in(name: str, strategy: str) -> None:
    rules = [Rule(name, "zeros" if dist.get_rank() else "xavier_normal")]
    if strategy == "fsdp2":
        weights_at_start(ShardedModule(mlp), InitCallback(seed=SEED, rules=rules), make_fsdp2_trainer)
    else:
        weights_at_start(DigitsModule(mlp), InitCallback(seed=SEED, rules=rules), make_ddp_trainer)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_that_differ_raise_with_the_first_parameter(strategy: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"network\.2\.weight"):
        run_ranks(differ_in, 2, "network.2.weight", strategy)

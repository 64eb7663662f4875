"""The report: every parameter once, proof that can fail, and the same facts in every form."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations

from lightning_init import SCHEMES, Constant, InitReport, Normal, Rule, TruncatedNormal, Uniform, initialize
from lightning_init.initialization.report import LINES, Entry
from tests.support.models import AllKinds, RowTransformer, mlp
from tests.support.modules import Unknown


def motley() -> nn.Module:
    """Drawn, tied, frozen, unknown, lazy, integer, parametrized: every kind of line."""
    model = nn.ModuleDict(
        {
            "all": AllKinds(),
            "table": nn.Embedding(10, 6, padding_idx=1),
            "head": nn.Linear(6, 10),
            "frozen": nn.Linear(2, 3).requires_grad_(False),
            "unknown": Unknown(),
            "lazy": nn.LazyLinear(3),
            "normed": parametrizations.weight_norm(nn.Linear(4, 3)),
            "rows": nn.Bilinear(2, 3, 4),
        }
    )
    model["head"].weight = model["table"].weight
    model["unknown"].count = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    return model


@pytest.fixture(scope="module")
def report() -> InitReport:
    return initialize(motley(), "he_normal", rules=[Rule("rows.*", "keep")], seed=4)


def test_report_has_every_parameter_exactly_once(report: InitReport) -> None:
    names = [name for name, _ in motley().named_parameters(remove_duplicate=False)]
    assert [entry.name for entry in report.entries] == names
    assert {*report.drawn, *report.left_alone} == set(report.entries)
    assert len(report.drawn) + len(report.left_alone) == len(names)
    for entry in report.drawn:
        assert entry.scheme
        assert entry.decided_by
        assert entry.target_std is not None
        assert entry.measured_std is not None
    for entry in report.left_alone:
        assert entry.reason
        assert (entry.scheme, entry.target_std, entry.measured_std, entry.gain) == ("", None, None, None)


def test_report_has_the_measured_numbers() -> None:
    model = nn.Sequential(nn.Linear(50, 40), nn.Embedding(30, 8), nn.LSTM(8, 9))
    report = initialize(model, "he_normal", seed=4)
    weight = report["0.weight"]
    assert (weight.module_type, weight.shape, weight.dtype) == ("Linear", (40, 50), "float32")
    assert (weight.decided_by, weight.scheme, weight.gain) == ("scheme", "he_normal", math.sqrt(2))
    assert (weight.fans, weight.target_std) == ((50, 40), pytest.approx(0.2))
    assert weight.measured_std == pytest.approx(model[0].weight.square().mean().sqrt().item(), rel=1e-6)
    assert (report["0.bias"].scheme, report["0.bias"].gain) == ("zeros", None)
    assert report["2.bias_ih_l0"].scheme == "zeros, f 1"
    assert report["2.bias_ih_l0"].measured_std == 0  # around what each gate is given


def test_report_is_indexed_by_parameter_name(report: InitReport) -> None:
    assert (
        report["unknown.A_log"].advice
        == "register(Unknown, 'A_log', lambda m: Fans(m.A_log.shape[1], m.A_log.shape[0]))"
    )
    with pytest.raises(KeyError, match=r"unknown\.A"):
        report["unknown.A"]


WITHOUT_ALIASES = list({scheme: name for name, scheme in reversed(SCHEMES.items())}.values())
NOT_CONSTANT = [name for name in WITHOUT_ALIASES if name not in ("zeros", "ones")]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", WITHOUT_ALIASES)
def test_verdict_on_good_draws_is_a_pass(scheme: str) -> None:
    """Within five standard errors are all but one in two million draws of large parameters; small ones are wider."""
    layers = [
        nn.Linear(1, 1),
        nn.Linear(3, 2),
        nn.Linear(40, 30),
        nn.Conv2d(6, 9, 3, groups=3),
        nn.LSTM(3, 5),
        nn.PReLU(),
    ]
    model = nn.ModuleList([*layers, nn.MultiheadAttention(6, 2), nn.Embedding(30, 9, padding_idx=1)])
    for seed in range(25):
        initialize(model, scheme, seed=seed).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", WITHOUT_ALIASES)
def test_verdict_allows_rounding(scheme: str, dtype: torch.dtype) -> None:
    model = nn.ModuleList([nn.Linear(5, 9), nn.Linear(48, 64), nn.Conv2d(8, 6, 3, groups=2), nn.LSTM(4, 8)]).to(dtype)
    for seed in range(5):
        initialize(model, scheme, seed=seed, rules=[Rule("0.bias", Constant(1 / 3))]).check()


@pytest.mark.parametrize(
    "scheme", [Normal(1e-3, mean=1.0), Uniform(0.9, 1.1), TruncatedNormal(0.02, mean=-3.0)], ids=repr
)
def test_verdict_allows_rounding_around_a_mean(scheme: Normal) -> None:
    model = nn.Linear(200, 100).bfloat16()
    initialize(model, scheme).check()


def tampered(report: InitReport, name: str, **changes: object) -> InitReport:
    entries = [dataclasses.replace(entry, **changes) if entry.name == name else entry for entry in report.entries]
    return dataclasses.replace(report, entries=tuple(entries))


@pytest.mark.parametrize("scheme", NOT_CONSTANT)
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_verdict_on_a_wrong_std_is_a_failure(scheme: str, factor: float) -> None:
    report = initialize(nn.Sequential(nn.Conv2d(64, 96, 3)), scheme, seed=1)  # 55296 weights
    report.check()
    measured = report["0.weight"].measured_std
    assert measured
    wrong = tampered(report, "0.weight", measured_std=measured * factor)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        wrong.check()
    assert str(caught.value) == (
        "measured and target std differ beyond sampling error:\n"
        f"  0.weight: measured {measured * factor:.6g}, target {report['0.weight'].target_std:.6g}"
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0])
def test_verdict_on_nan_is_a_failure(wrong: float) -> None:
    report = tampered(initialize(nn.Linear(50, 50)), "weight", measured_std=wrong)
    with pytest.raises(ValueError, match=r"differ beyond sampling error:\n  weight: measured (nan|inf|0),"):
        report.check()
    assert json.loads(report.to_json())["entries"][0]["measured_std"] in (None, 0.0)


def test_verdict_on_a_wrong_constant_is_a_failure() -> None:
    report = initialize(nn.Linear(5, 5), "ones")
    with pytest.raises(ValueError, match=r"weight: measured 0\.001, target 0"):
        tampered(report, "weight", measured_std=1e-3).check()


def test_verdict_on_overflow_is_a_failure() -> None:
    report = initialize(nn.Linear(5, 5), Normal(1e3))
    entry = dataclasses.replace(report["weight"], measured_std=math.inf)
    with pytest.raises(ValueError, match="weight: measured inf, target 1000"):
        dataclasses.replace(report, entries=(entry,)).check()
    with pytest.raises(ValueError, match=r"'weight' was to have a std of 1e.* and has inf in float16"):
        initialize(nn.Linear(5, 5).half(), Normal(1e6))


def test_sampling_error_shrinks_with_the_number_of_elements() -> None:
    small, large = (initialize(nn.Linear(n, n), "he_normal")["weight"] for n in (8, 512))
    assert small.target_std
    assert large.target_std
    assert small.tolerance / small.target_std == pytest.approx(5 / math.sqrt(2 * 64), rel=0.01)
    assert large.tolerance / large.target_std == pytest.approx(5 / math.sqrt(2 * 512**2), rel=0.02)


def test_target_of_several_chunks_is_their_root_mean_square() -> None:
    report = initialize(nn.MultiheadAttention(12, 2, bias=False), "he_normal")
    assert report["in_proj_weight"].target_std == pytest.approx(math.sqrt(2 / 12))


def rows_of(text: str) -> list[str]:
    """The table's rows on the console: below the rule under the header, above the notes and the advice."""
    _, below = text.split("──", 1)
    table, *_ = re.split("To draw what is unknown|not drawn, for", below)
    return [line for line in table.splitlines()[1:] if line.strip()]


def many_types() -> nn.Module:
    layers = [nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d]
    model = nn.ModuleList([kind(2, 3, 4) if kind is not nn.Linear else kind(2, 3) for kind in layers])
    model.append(Unknown())
    return model


@pytest.mark.parametrize("make", [motley, many_types, mlp, RowTransformer, lambda: nn.ReLU()])
def test_console_table_has_ten_rows_at_most(make: Callable[[], nn.Module]) -> None:
    report = initialize(make(), "he_normal")
    rows = rows_of(str(report))
    assert len(rows) <= LINES == 10
    assert sum(count_in(row) for row in rows) == len(report.entries)
    assert str(report).splitlines()[0].rstrip() == report.title


def count_in(row: str) -> int:
    cells = re.split(r"\s{2,}", row.strip())
    return int(cells[1] if "more groups" in row else cells[2])


def test_console_table_includes_what_is_left_alone() -> None:
    text = str(initialize(many_types()))
    assert "… 6 more groups" in text
    assert rows_of(text)[0].split("  ")[0].strip() == "Unknown"
    assert "left: type unknown" in text
    assert (
        "To draw what is unknown: register(Unknown, 'A_log', lambda m: Fans(m.A_log.shape[1], m.A_log.shape[0]))"
        in text
    )


def test_console_table_groups_originals_of_parametrized_weights() -> None:
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(12)))
    assert sum("written together" in row for row in rows_of(str(initialize(model)))) == 1


def test_console_table_prints_brackets_of_patterns() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    assert "([ab].weight)" in str(initialize(model, rules=[Rule("[ab].weight", "zeros")]))


def test_console_table_fits_eighty_columns(report: InitReport) -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(report)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(rows_of(capture.get())) == 10  # nothing is broken into two lines
    header = next(line for line in lines if "drawn from" in line)
    assert header.split() == ["module", "drawn", "from", "count", "gain", "target", "std", "measured", "std"]


def test_title_has_the_number_of_parameters(report: InitReport) -> None:
    assert report.title == f"he_normal, seed 4: {len(report.drawn)} of {len(report.entries)} parameters drawn"


def test_json_round_trip_of_a_report(report: InitReport) -> None:
    there = json.loads(report.to_json())
    assert there == report.to_dict()
    assert (there["scheme"], there["seed"]) == ("he_normal", 4)
    fields = [field.name for field in dataclasses.fields(Entry)]
    for plain, entry in zip(there["entries"], report.entries, strict=True):
        assert list(plain) == fields
        assert plain["shape"] == list(entry.shape)
        for name in (
            "name",
            "module_type",
            "dtype",
            "decided_by",
            "scheme",
            "gain",
            "target_std",
            "measured_std",
            "reason",
        ):
            assert plain[name] == getattr(entry, name)
    table = next(plain for plain in there["entries"] if plain["name"] == "all.transformer.positions.weight")
    assert table["fans"] == {"fan_in": 1.0, "fan_out": None}  # a lookup has no gradient to hand on


def test_markdown_table_has_every_parameter(report: InitReport) -> None:
    title, blank, header, rule, *rows, below, note = report.to_markdown().splitlines()
    assert below == ""
    assert note.startswith("- not drawn, for they have no shape before the first batch: lazy.")
    assert title == f"**{report.title}**"
    assert blank == ""
    assert {row.count("|") for row in (header, rule, *rows)} == {11}
    assert [row.split("|")[1].strip(" `") for row in rows] == [entry.name for entry in report.entries]
    by_name = dict(zip([entry.name for entry in report.entries], rows, strict=True))
    assert "left alone: frozen" in by_name["frozen.weight"]
    assert f"{report['all.wide.0.weight'].measured_std:.6g}" in by_name["all.wide.0.weight"]

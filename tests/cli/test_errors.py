"""Every kind of mistake in what a class is given, as jsonargparse reports it and as one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lightning_init.cli.errors import explain


class Animal:
    def __init__(self, legs: int = 4, noise: Literal["bark", "meow"] | None = None) -> None: ...


class Dog(Animal): ...


@dataclass(frozen=True)
class Collar:
    color: Literal["red", "blue"] = "red"
    length: float | None = None


def report_of(*arguments: str) -> str:
    """What jsonargparse says about these arguments."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pet", type=Animal | None)
    parser.add_argument("--collars", type=list[Collar] | None)
    parser.add_argument("--age", type=float | None)
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(list(arguments))
    return str(error.value)


HERE = __name__


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (f"--pet={HERE}.Dgo", f"pet: {HERE} has no 'Dgo'; did you mean 'Dog'?"),
        (f"--pet={HERE}.Collar", f"pet: {HERE}.Collar is no Animal"),
        ("--pet=Dog2", "pet: 'Dog2' is neither the import path of a class nor a block of arguments"),
        ("--pet.lges=3", "pet: Animal has no argument 'lges', only legs, noise; did you mean 'legs'?"),
        ("--pet.legs=many", "pet.legs: 'many' is not of type int"),
        ("--pet.noise=brak", "pet.noise: 'brak' is not one of bark, meow; did you mean 'bark'?"),
        (
            "--collars=[{colour: red}]",
            "collars: Collar has no argument 'colour', only color, length; did you mean 'color'?",
        ),
        ("--collars=[{color: green}]", "collars.color: 'green' is not one of red, blue"),
        ("--collars=[{length: long}]", "collars.length: 'long' is not of type float or null"),
        ("--age=old", "age: 'old' is not of type float or null"),
    ],
)
def test_error_is_explained_in_one_line(argument: str, line: str) -> None:
    assert explain(report_of(argument)) == line


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--petz.legs=3", "unknown option 'petz.legs'; did you mean 'pet'?"),
        ("--ages=3", "unknown option 'ages'; did you mean 'age'?"),
        ("--quite.else=3", "unknown option 'quite.else'"),
    ],
)
def test_error_of_unknown_keys_names_the_nearest(argument: str, line: str) -> None:
    assert explain(report_of(argument), known_keys=["pet", "collars", "age"]) == line


def test_error_of_unknown_form_is_shown_whole() -> None:
    assert explain("Something new\n  went wrong: {'a': 1}") == "Something new went wrong: {'a': 1}"

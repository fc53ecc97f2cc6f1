"""Choices as objects: what a name is short for, where flat options go, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import pickle
import pkgutil
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import imu_fast
from imu_fast.errors import InputError, check_choice, check_count, check_positive
from imu_fast.options import Choice, Options, Table, option, options


class Shape(Options):
    """The innermost choice."""


@options
class Round(Shape):
    name = "round"
    radius: float = option(default=1.0, check=check_positive, also="r")


@options
class Square(Shape):
    name = "square"
    side: float = option(default=2.0, check=check_positive)
    tilt: float = option(default=0.0)


@options
class Held(Shape):
    tensor: torch.Tensor = option()


def _held(value):
    return Held(tensor=value) if isinstance(value, torch.Tensor) else None


SHAPES: Table[Shape] = Table("shape", Shape, {"round": Round, "square": Square}, _held)


class Paint(Options):
    """The choice between."""


@options
class Plain(Paint):
    name = "plain"


@options
class Brush(Paint):
    name = "brush"
    shape: Choice[Shape, str] = Choice(SHAPES, "round")
    layers: object = option(default=None)
    color: str = option(default="red", check=lambda n, v: check_choice(n, v, ("red", "blue")))


@options
class Spray(Paint):
    name = "spray"
    pressure: float = option(default=3.0, check=check_positive)


PAINTS: Table[Paint] = Table("paint", Paint, {"plain": Plain, "brush": Brush, "spray": Spray})


class Work(Options):
    """The outermost."""


@options
class Wall(Work):
    name = "wall"
    paint: Choice[Paint, str] = Choice(PAINTS, "plain")
    coats: int = option(default=1, check=check_count)
    # Hides a brush's own.
    color: str = option(default="white")

    def check(self):
        if self.paint.name == "spray" and self.coats < 2:
            raise InputError(f"coats={self.coats} with paint='spray'; it takes two")


@options
class Fence(Work):
    name = "fence"
    front: Choice[Paint, str] = Choice(PAINTS, "plain")
    back: Choice[Paint, str] = Choice(PAINTS, "plain")


def _twice(wall, value):
    check_choice("preset", value, ("twice",))
    return dataclasses.replace(wall, coats=2, paint=Brush(shape="square"))


@options
class Preset(Wall):
    name = "preset"
    shorthands = {"preset": _twice}  # noqa: RUF012


WORKS: Table[Work] = Table(
    "work", Work, {"wall": Wall, "fence": Fence, "brushed": lambda: Wall(paint="brush")}
)


def refuses(message, function, *args, **kwargs):
    with pytest.raises(InputError, match=message):
        function(*args, **kwargs)


def test_a_name_is_short_for_the_object_with_its_defaults():
    assert WORKS.choose("wall") == Wall() == Wall(paint=Plain(), coats=1)
    assert WORKS.choose("brushed") == Wall(paint=Brush())
    assert Wall(paint="brush").paint == Brush(shape=Round())
    given = Wall(coats=3)
    assert WORKS.choose(given) is given
    assert list(WORKS) == ["wall", "fence", "brushed"] and WORKS["wall"] == Wall()


def test_fields_are_given_by_keyword():
    with pytest.raises(TypeError):
        Wall("brush")
    with pytest.raises(TypeError):
        Wall(colour="red")
    with pytest.raises(TypeError, match="tensor"):
        Held()


def test_options_go_where_they_belong_at_any_depth():
    made = WORKS.choose("brushed", radius=5.0, coats=2, layers=["fc"])
    assert made == Wall(paint=Brush(shape=Round(radius=5.0), layers=["fc"]), coats=2)
    assert WORKS["brushed"].paint.shape.radius == 1.0, "the table's own is as it was"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("work", ["wall", "brushed"])
def test_choices_decide_first_which_other_options_there_are(work, reverse):
    given = dict(paint="brush", shape="square", side=7.0, tilt=1.0, coats=4)
    if reverse:
        given = dict(reversed(given.items()))
    made = WORKS.choose(work, **given)
    assert made == Wall(paint=Brush(shape=Square(side=7.0, tilt=1.0)), coats=4)
    made = Table("work", Work, {"preset": Preset}).choose("preset", **given)
    assert made == Preset(paint=Brush(shape=Square(side=7.0, tilt=1.0)), coats=4)
    assert repr(Preset(paint="plain")) == "Preset()"


def test_an_object_for_a_choice_and_options_elsewhere():
    made = WORKS.choose("wall", paint=Brush(shape=Square(side=3.0)), coats=2)
    assert made == Wall(paint=Brush(shape=Square(side=3.0)), coats=2)
    made = WORKS.choose("brushed", shape=Square(), layers="fc")
    assert made == Wall(paint=Brush(shape=Square(), layers="fc"))


def test_an_outer_option_hides_an_inner_of_its_name():
    made = WORKS.choose("brushed", color="green")
    assert made.color == "green" and made.paint.color == "red"
    assert made.paths()["color"] == ("color",)


def test_none_is_not_given():
    assert WORKS.choose("wall", coats=None, paint=None, nonsense=None) == Wall()
    given = Wall()
    assert WORKS.choose(given, coats=None) is given
    assert Wall().with_options("a wall", {"coats": None}) == Wall()


def test_a_second_name():
    assert WORKS.choose("brushed", r=4.0).paint.shape == Round(radius=4.0)
    assert Round(radius=4.0).get("r") == Round(radius=4.0).get("radius") == 4.0
    refuses("^r and radius are two names of one option", SHAPES.choose, "round", r=1.0, radius=1.0)
    refuses("^radius and r are two names of one option", SHAPES.choose, "round", radius=1.0, r=1.0)
    refuses("^radius and r are two names", WORKS.choose, "brushed", radius=1.0, r=2.0)


def test_two_options_of_one_name_are_the_programmers_mistake():
    with pytest.raises(TypeError, match="Twice has two options of the name size"):

        @options
        class Twice(Options):
            size: int = option(default=1)
            length: int = option(default=1, also="size")


def test_an_option_of_two_objects_is_refused():
    made = WORKS.choose("fence", front="brush", back="brush")
    assert made == Fence(front=Brush(), back=Brush())
    message = "^radius belongs to front.shape and to back.shape; give it to the object"
    refuses(message, WORKS.choose, "fence", front="brush", back="brush", radius=2.0)
    refuses(
        "^shape belongs to front and to back",
        WORKS.choose,
        "fence",
        front="brush",
        back="brush",
        shape="square",
    )
    made = WORKS.choose("fence", front="brush", radius=2.0)
    assert made == Fence(front=Brush(shape=Round(radius=2.0)))


def test_what_is_unknown_lists_what_is_known():
    message = r"work='wal' is unknown; choose one of wall, fence, brushed; did you mean wall\?$"
    refuses(message, WORKS.choose, "wal")
    refuses(r"work='roof' is unknown; choose one of wall, fence, brushed$", WORKS.choose, "roof")
    refuses(r"job='wal' is unknown", WORKS.choose, "wal", "job")
    refuses("^paint='oil' is unknown; choose one of plain, brush, spray$", Wall, paint="oil")
    refuses("^paint='oil' is unknown", WORKS.choose, "wall", paint="oil")
    refuses("^front='oil' is unknown", Fence, front="oil")


def test_an_option_that_is_not_there_lists_those_that_are():
    refuses(
        r"^work='wall' has no option size; it has coats, color, paint$",
        WORKS.choose,
        "wall",
        size=1,
    )
    refuses(r"^paint='plain' has no option size; it has none$", PAINTS.choose, "plain", size=1)
    refuses("^job='wall' has no option size", WORKS.choose, "wall", "job", size=1)
    refuses(
        r"has no option raduis; it has .*, r, radius, .*; did you mean radius\?$",
        WORKS.choose,
        "brushed",
        raduis=1,
    )


def test_an_option_of_another_choice_says_which():
    refuses(
        r"^work='wall' has no option pressure; .*; paint='spray' would$",
        WORKS.choose,
        "wall",
        pressure=1,
    )
    refuses(r"no option side; .*; shape='square' would$", WORKS.choose, "brushed", side=1)
    # Of the choices that were made, not of the defaults.
    refuses(
        r"no option pressure; .*color, layers, .*; paint='spray' would$",
        WORKS.choose,
        "wall",
        paint="brush",
        pressure=1,
    )
    refuses(
        r"it has back, front; back='brush' or front='brush' would$",
        WORKS.choose,
        "fence",
        shape="round",
    )


def test_who_has_an_option_is_said_before_what_is_spelled_like_it():
    @options
    class Near(Options):
        paint: Choice[Paint, str] = Choice(PAINTS, "plain")
        pressures: float = option(default=1.0)

    refuses(
        r"; paint='spray' would$", Table("near", Near, {"near": Near}).choose, "near", pressure=1
    )


def test_an_object_holds_its_own_options():
    message = (
        r"^work=Wall\(coats=2\) is an object, which holds its own options; give coats, paint to"
    )
    refuses(message, WORKS.choose, Wall(coats=2), coats=3, paint="brush")
    # At any depth, plain options and choices alike.
    message = r"^paint=Brush\(\) is an object, which holds its own options; give {} to it"
    refuses(message.format("radius"), WORKS.choose, "wall", paint=Brush(), radius=2.0)
    refuses(message.format("shape"), WORKS.choose, "wall", paint=Brush(), shape="square")
    refuses(message.format("shape"), WORKS.choose, "wall", shape=Square(), paint=Brush())
    refuses(r"^shape=Square\(\) is an object", WORKS.choose, "brushed", shape=Square(), side=2.0)


def test_a_class_is_no_object():
    refuses(
        r"^paint is the class Brush; pass an object, Brush\(...\), or one of the names plain, ",
        Wall,
        paint=Brush,
    )
    refuses(r"^shape is the class Round; pass an object", SHAPES.choose, Round)
    refuses(r"^shape is the class Brush; pass an object", SHAPES.choose, Brush)
    refuses(r"^shape=<class 'dict'>; pass a Shape or one of the names round", SHAPES.choose, dict)


def test_what_is_of_another_kind():
    refuses(r"^paint=Round\(\); pass a Paint or one of the names plain", Wall, paint=Round())
    refuses(r"^shape=3; pass a Shape or one of the names round, square$", SHAPES.choose, 3)
    refuses(r"^shape=None; pass a Shape", SHAPES.choose, None)


def test_what_holds_something_else():
    tensor = torch.ones(3)
    assert SHAPES.choose(tensor) == Held(tensor=tensor)
    made = WORKS.choose("wall", paint="brush", shape=tensor)
    assert made.paint.shape.tensor is tensor

    @options
    class Torn(Shape):
        value: complex = option()
        edge: float = option(default=0.0)

    table = Table("shape", Shape, {}, lambda v: Torn(value=v) if isinstance(v, complex) else None)
    assert table.choose(1j, edge=2.0) == Torn(value=1j, edge=2.0)
    refuses(r"^shape=1j has no option radius; it has edge, value$", table.choose, 1j, radius=2.0)


def test_values_are_checked_wherever_they_come_from():
    refuses(r"^radius=-1.0 must be", Round, radius=-1.0)
    refuses(r"^radius=-1.0 must be", SHAPES.choose, "round", radius=-1.0)
    refuses(r"^radius=-1.0 must be", SHAPES.choose, "round", r=-1.0)
    refuses(r"^radius=-1.0 must be", WORKS.choose, "brushed", radius=-1.0)
    refuses(r"^color='pink' is unknown", PAINTS.choose, "brush", color="pink")
    refuses(r"^coats=0 must be", dataclasses.replace, Wall(), coats=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_options_that_agree_together_may_contradict_the_defaults(reverse):
    """A spray takes two coats, and one is the default."""
    given = dict(paint="spray", coats=2)
    if reverse:
        given = dict(reversed(given.items()))
    assert WORKS.choose("wall", **given) == Wall(paint=Spray(), coats=2)
    message = "^coats=1 with paint='spray'; it takes two$"
    refuses(message, WORKS.choose, "wall", paint="spray")
    refuses(message, Wall, paint="spray")
    refuses(message, Wall(paint="spray", coats=2).with_options, "", {"coats": 1})


def test_a_shorthand_gives_way_to_what_is_given():
    table = Table("work", Work, {"preset": Preset})
    made = table.choose("preset", preset="twice")
    assert made == Preset(coats=2, paint=Brush(shape=Square()))
    made = table.choose("preset", side=5.0, coats=3, preset="twice")
    assert made == Preset(coats=3, paint=Brush(shape=Square(side=5.0)))
    refuses("preset='once' is unknown", table.choose, "preset", preset="once")
    refuses("it has coats, color, paint, preset$", table.choose, "preset", size=1)


def test_what_is_shown_is_what_differs():
    assert repr(Wall()) == "Wall()"
    assert repr(Wall(coats=3, color="white")) == "Wall(coats=3)"
    assert repr(Wall(paint="plain")) == "Wall()"
    made = WORKS.choose("wall", paint="brush", shape="square", side=4.0)
    assert repr(made) == "Wall(paint=Brush(shape=Square(side=4.0)))"
    assert eval(repr(made)) == made
    assert repr(Held(tensor=torch.tensor(1))) == "Held(tensor=tensor(1))"
    assert repr(Square(tilt=False)) == "Square(tilt=False)", "of another type is another value"


def test_flat_options_and_their_values():
    made = WORKS.choose("brushed", radius=2.0)
    assert made.flat() == {
        "paint": "brush",
        "coats": 1,
        "color": "white",
        "shape": "round",
        "layers": None,
        "radius": 2.0,
    }, "each once, not under its second name"
    assert WORKS.choose("brushed", **made.flat()) == made
    assert list(made.flat())[:3] == ["paint", "coats", "color"], "its own come first"
    assert Wall(paint=Brush(shape=torch.ones(1))).flat()["shape"] == "Held(tensor=tensor([1.]))"
    assert made.get("radius") == 2.0
    with pytest.raises(KeyError):
        made.get("side")


def test_equality_and_hash():
    one, same = Wall(paint=Brush(layers="fc")), WORKS.choose("brushed", layers="fc")
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1
    assert one != Wall(paint=Brush(layers="conv")) and Wall() != Preset() and Wall() != "wall"
    assert Round(radius=1) == Round(radius=np.float64(1)) == Round()
    assert hash(Round(radius=1)) == hash(Round(radius=np.float64(1))) == hash(Round())
    lists = Brush(layers=["fc"]), Brush(layers=["fc"])
    assert lists[0] == lists[1] and hash(lists[0]) == hash(lists[1])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x]], ids=["alone", "in a list"])
def test_tensors_and_arrays_equal_themselves_alone(wrap):
    for make in (lambda: torch.ones(3), lambda: np.ones(3)):
        value = make()
        assert Brush(layers=wrap(value)) == Brush(layers=wrap(value))
        assert Brush(layers=wrap(value)) != Brush(layers=wrap(make()))
        assert Brush(layers=wrap(value)) != Brush(layers=1.0)
        hash(Brush(layers=wrap(value)))
    one = torch.ones(())
    assert Brush(layers=one) != Brush(layers=torch.ones(())) and Brush(layers=one) != Brush(
        layers=1
    )


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_copies_and_pickles_are_equal(again):
    made = WORKS.choose("brushed", shape="square", side=4.0, layers=["fc"])
    found = again(made)
    assert found == made and repr(found) == repr(made)
    assert found.with_options("", {"side": 5.0}).paint.shape.side == 5.0


def test_nothing_changes():
    made = Wall(paint="brush")
    for name in ("coats", "paint", "other"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, "round")
    with pytest.raises(dataclasses.FrozenInstanceError):
        del made.paint
    before = copy.deepcopy(made)
    made.with_options("", {"radius": 3.0, "coats": 2})
    dataclasses.replace(made, paint="plain")
    assert made == before


def shipped():
    """Every name in every table of the engine: the table, the name."""
    tables = {}
    for module in pkgutil.walk_packages(imu_fast.__path__, "imu_fast."):
        if module.name.split(".")[1] not in ("cli", "kernels", "study", "integrations", "check"):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, Table):
                    tables[id(value)] = value
    return [(table, name) for table in tables.values() for name in table]


SHIPPED = shipped()


@pytest.mark.parametrize("table, name", SHIPPED, ids=[f"{t.kind}={n}" for t, n in SHIPPED])
def test_every_choice_of_the_package_is_one(table, name):
    made = table[name]
    assert isinstance(made, table.base) and made == table[name] and made is not table[name]
    assert hash(made) == hash(table[name]) and repr(made) == repr(table[name])
    assert copy.deepcopy(made) == pickled(made) == made
    for option_name, ways in made._ways().items():
        assert len(ways) == 1, f"{option_name} as a flat option would be refused: {ways}"
    with pytest.raises(InputError, match=f"^{table.kind}='{name}' has no option no_such_option;"):
        table.choose(name, no_such_option=1)


@pytest.mark.parametrize(
    "number", [np.float32(0.25), torch.tensor(0.25), Fraction(1, 4), Decimal("0.25")], ids=repr
)
def test_numbers_of_other_libraries_become_pythons_own(number, tmp_path):
    """As a sweep gives them: what is told of a run can be compared, and written to a file."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 3), torch.randn(30, 6)
    data = x, model(x).argmax(1)
    options = {"lr": number, "alpha": number, "damping": number, "on_empty": "uniform"}
    stop = imu_fast.StopRule(forget_loss=number, unseen_accuracy=number)
    assert repr(stop) == "StopRule(unseen_accuracy=0.25, forget_loss=0.25)"
    options |= {"epochs": np.int64(2), "checkpoint": tmp_path / "run.safetensors"}
    result = imu_fast.unlearn(model, data, stop=stop, **options)
    said = json.loads(json.dumps(result.settings))
    assert [said[name] for name in ("lr", "alpha", "damping")] == [0.25] * 3
    assert said["epochs"] == 2 and said["unseen_accuracy"] == 0.25
    for bad in (torch.tensor([0.25]), np.array([0.25])):
        with pytest.raises(imu_fast.InputError, match="lr=.* is not a number"):
            imu_fast.unlearn(model, data, lr=bad)

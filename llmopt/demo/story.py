"""How a story of the demo is told.

What is drawn decides what must follow: names, numbers and possessions come back later, pronouns and plurals agree.
A model has to look back to know these words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from llmopt.demo import vocabulary as say
from llmopt.demo.choices import Choice, Pen, either, zipf

_AN_ADJECTIVE = say.with_article(say.ADJECTIVES)
_ADVERB_OR_TOWARDS = either((0.4, say.WAYS), (0.6, say.TOWARDS))
_QUALITY_OR_PLACE = either((0.5, say.QUALITIES), (0.5, say.PLACES))
_MOST_EVENTS = 16


@dataclass(slots=True, kw_only=True)
class _Tale:
    """What has been told, and so must stay true. `hero` owns `count` of `thing`, and was last seen at `place`."""

    hero: str
    town: str
    trade: str
    adjective: str
    friend: str
    friends_trade: str
    pet: str
    animal: str
    thing: str
    count: int
    place: str | None = None

    @property
    def things(self) -> str:
        """All that the hero owns by now: `three red apples`."""
        return f"{say.NUMBERS[self.count - 1]} {_many(self.thing, self.count)}"


def tell(pen: Pen) -> None:
    """Write a whole story: who it is about, some events, and how it ends."""
    tale = _introduce(pen)
    told = 0
    while pen.choose(_next_or_last(told)) in say.NEXT.options:
        _happen(pen, tale)
        told += 1
    _conclude(pen, tale)


def _introduce(pen: Pen) -> _Tale:
    pen.choose(say.SETTINGS)
    town = pen.choose(say.TOWNS)
    pen.choose(say.LIVED)
    hero = pen.choose(say.PEOPLE)
    pen.write("the")
    adjective = pen.choose(say.ADJECTIVES)
    trade = pen.choose(say.TRADES)
    pen.write(f". {say.possessive(hero)}")
    relation = pen.choose(say.RELATIONS)
    pen.write("was")
    friend = pen.choose(_names(relation, hero))
    pen.write("the")
    friends_trade = pen.choose(say.TRADES)
    pen.write(f". {say.pronoun(hero)}")
    pen.choose(say.OWNED)
    count, thing = _choose_things(pen)
    pen.write("and")
    pet = pen.choose(say.PETS)
    pen.write("the")
    animal = pen.choose(say.ANIMALS)
    pen.write(".")
    return _Tale(
        hero=hero, town=town, trade=trade, adjective=adjective, friend=friend, friends_trade=friends_trade,
        pet=pet, animal=animal, count=count, thing=thing,
    )  # fmt: skip


def _choose_things(pen: Pen) -> tuple[int, str]:
    """How many, and what in the singular: `three red apples` is (3, "red apple")."""
    count = say.NUMBERS.index(pen.choose(say.HOW_MANY)) + 1
    word = pen.choose(_color_or_things(count > 1))
    if word in say.COLORS.options:
        word += f" {pen.choose(_things(count > 1))}"
    return count, word.removesuffix("s") if count > 1 else word


def _choose_place(pen: Pen) -> str:
    """Where, perhaps with a quality: `old mill`."""
    pen.write("the")
    word = pen.choose(_QUALITY_OR_PLACE)
    return f"{word} {pen.choose(say.PLACES)}" if word in say.QUALITIES.options else word


def _happen(pen: Pen, tale: _Tale) -> None:
    """One event, from behind the words that set its time up to the full stop."""
    if pen.choose(_subjects(tale.hero, tale.trade)) in say.WEATHER.options:
        pen.write(".")
        return
    verb = pen.choose(_verbs(can_give=tale.count > 1, can_get=tale.count < len(say.NUMBERS)))
    next(deed.narrate for deed in _DEEDS if verb in deed.verbs.options)(pen, tale)


def _go(pen: Pen, tale: _Tale) -> None:
    if pen.choose(_ADVERB_OR_TOWARDS) in say.WAYS.options:
        pen.choose(say.TOWARDS)
    tale.place = _choose_place(pen)
    if pen.choose(_stop_or(f", and {tale.pet}", f", and the {tale.animal}")) != ".":
        pen.choose(say.FOLLOWING)
        pen.write(".")


def _see(pen: Pen, tale: _Tale) -> None:
    _choose_things(pen)
    while pen.choose(_stop_or(",", "and")) != ".":
        _choose_things(pen)


def _give(pen: Pen, tale: _Tale) -> None:
    given = say.NUMBERS.index(pen.choose(_numbers_up_to(tale.count - 1))) + 1
    pen.write(f"{_many(tale.thing, given)} to")
    pen.choose(_friend_or_tradesman(f"{tale.friend} the {tale.friends_trade}"))
    tale.count -= given
    pen.write(f", keeping {say.NUMBERS[tale.count - 1]} .")


def _get(pen: Pen, tale: _Tale) -> None:
    found = say.NUMBERS.index(pen.choose(_numbers_up_to(len(say.NUMBERS) - tale.count))) + 1
    pen.write(f"more {_many(tale.thing, found)}")
    pen.choose(say.NEAR)
    if tale.place is None:
        tale.place = _choose_place(pen)
    else:
        pen.write(f"the {tale.place}")
    tale.count += found
    pen.write(f", making {say.NUMBERS[tale.count - 1]} .")


def _meet(pen: Pen, tale: _Tale) -> None:
    pen.choose(_AN_ADJECTIVE)
    pen.choose(say.TRADES)
    if pen.choose(_stop_or("who was")) != ".":
        pen.choose(say.DOING)
        pen.choose(say.NEAR)
        _choose_place(pen)
        pen.write(".")


def _ask(pen: Pen, tale: _Tale) -> None:
    pen.write(f"{tale.friend} about")
    pen.choose(_topics(f"{tale.pet} the {tale.animal}", f"{say.possessive(tale.hero)} {tale.things}", tale.town))
    pen.write(f", but {say.pronoun(tale.friend)}")
    pen.choose(say.REPLIES)
    pen.write(".")


def _feel(pen: Pen, tale: _Tale) -> None:
    pen.choose(say.FEELINGS)
    if pen.choose(_stop_or(f"because {tale.friend} was", f"because {tale.pet} was")) != ".":
        pen.choose(say.DOING)
        pen.write(".")


def _conclude(pen: Pen, tale: _Tale) -> None:
    pen.write(tale.hero)
    pen.choose(say.RETURNING)
    pen.write(f"to {tale.town} with {tale.pet} the {tale.animal} and {tale.things} .")
    pen.choose(say.CLOSING)
    pen.choose(say.TOWNSPEOPLE)
    pen.choose(say.SAYING)
    pen.write(f"{tale.hero} the {tale.adjective} {tale.trade} .")


@dataclass(frozen=True, slots=True)
class _Deed:
    """Something that people do: how often, by which verbs, and how the sentence goes on behind the verb."""

    share: float
    verbs: Choice
    narrate: Callable[[Pen, _Tale], None]


_GIVE = _Deed(0.10, say.GIVING, _give)
_GET = _Deed(0.10, say.GETTING, _get)
_DEEDS = (
    _GIVE,
    _GET,
    _Deed(0.22, say.GOING, _go),
    _Deed(0.28, say.SEEING, _see),
    _Deed(0.16, say.MEETING, _meet),
    _Deed(0.07, say.ASKING, _ask),
    _Deed(0.07, say.FEELING, _feel),
)


@cache
def _next_or_last(told: int) -> Choice:
    """The end comes nearer with every event, so that no story is endless."""
    if told == 0:
        return say.NEXT
    return say.LAST if told == _MOST_EVENTS else either((_MOST_EVENTS - told, say.NEXT), (told, say.LAST))


@cache
def _verbs(*, can_give: bool, can_get: bool) -> Choice:
    possible = {_GIVE: can_give, _GET: can_get}
    return either(*((deed.share, deed.verbs) for deed in _DEEDS if possible.get(deed, True)))


@cache
def _subjects(hero: str, trade: str) -> Choice:
    who = Choice((say.pronoun(hero), hero, f"the {trade}"), (0.5, 0.3, 0.2))
    return either((0.93, who), (0.07, say.WEATHER))


@cache
def _names(relation: str, hero: str) -> Choice:
    return say.people_called(relation).without(hero)


@cache
def _things(several: bool) -> Choice:
    return say.plural(say.THINGS) if several else say.THINGS


@cache
def _color_or_things(several: bool) -> Choice:
    return either((0.4, say.COLORS), (0.6, _things(several)))


@cache
def _numbers_up_to(most: int) -> Choice:
    return zipf(say.NUMBERS[:most])


@cache
def _stop_or(*clauses: str) -> Choice:
    return either((0.4, zipf(["."])), (0.6, zipf(clauses)))


@cache
def _friend_or_tradesman(friend: str) -> Choice:
    return either((0.5, zipf([friend])), (0.5, say.with_the(say.TRADES)))


@cache
def _topics(pet: str, things: str, town: str) -> Choice:
    return zipf((things, pet, town))


def _many(thing: str, count: int) -> str:
    return thing if count == 1 else f"{thing}s"

"""Rules of optimizers: one class a family, one line here.

Which families are asked is told by the state that was recorded of a parameter and by the numbers among the settings; which
of their rules is followed, by the replay.
"""

from __future__ import annotations

from typing import Final

from differ.replay.rules.adadelta import AdaDelta
from differ.replay.rules.adafactor import Adafactor
from differ.replay.rules.adagrad import Adagrad
from differ.replay.rules.adam import Adam
from differ.replay.rules.adamax import Adamax
from differ.replay.rules.base import OPTIMIZER, Family, Hyper, Rule
from differ.replay.rules.lion import Lion
from differ.replay.rules.muon import Muon
from differ.replay.rules.nadam import NAdam
from differ.replay.rules.radam import RAdam
from differ.replay.rules.rmsprop import RmsProp
from differ.replay.rules.sgd import Sgd

# Where several rules fit, the report names that of the first family, and of it the first rule.
FAMILIES: Final[tuple[Family, ...]] = (
    Adam(),
    Sgd(),
    RAdam(),
    NAdam(),
    Adamax(),
    RmsProp(),
    Adagrad(),
    AdaDelta(),
    Lion(),
    Adafactor(),
    Muon(),
)
_BY_NAME: Final = {family.name: family for family in FAMILIES}


def _all_rules() -> list[Rule]:
    updates = [how for family in FAMILIES for how in family.updates]
    return [*updates, *(how for family in FAMILIES for rules in family.moments.values() for how in rules)]


ORDER: Final = {how: i for i, how in enumerate(dict.fromkeys(_all_rules()))}

# Words for a report.
SENTENCES: Final = {choice: words for family in reversed(FAMILIES) for choice, words in family.words.items()}


def families_of(kinds: frozenset[str], hyper: Hyper) -> tuple[Family, ...]:
    """Families that keep such state."""
    return tuple(family for family in FAMILIES if family.keeps(kinds, hyper))


def update_rules(kinds: frozenset[str], hyper: Hyper) -> tuple[Rule, ...]:
    """Rules that an update of a parameter with such state may follow."""
    return tuple(how for family in families_of(kinds, hyper) for how in family.updates)


def moment_rules(kinds: frozenset[str], hyper: Hyper, kind: str) -> tuple[Rule, ...]:
    """Rules that one kind of that state may follow."""
    found = (how for family in families_of(kinds, hyper) for how in family.moments.get(kind, ()))
    return tuple(dict.fromkeys(found))


def family_of(how: Rule) -> Family:
    """The family of a rule; rules of moments that several share are Adam's."""
    return _BY_NAME[dict(how).get(OPTIMIZER, "adam")]


def initial(kind: str, hyper: Hyper) -> float:
    """What state of a kind is before the first update."""
    if kind == "mu_product":
        return 1.0
    return hyper.get("initial_accumulator_value") if kind == "sum" else 0.0

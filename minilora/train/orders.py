"""Orders and the JSON that they say: extraction's task made harder by fields within fields and by what is not said.

    "Amara Okonkwo from Lisbon ordered 14 lamps and 3 chairs."
    {"customer":{"name":"Amara Okonkwo","city":"Lisbon"},"items":[{"thing":"lamps","quantity":14},
     {"thing":"chairs","quantity":3}],"date":null}

One to three items, each its own object in a list, in the order of the sentence; the city is left out of three orders in
ten, the date of three in ten, and what is left out is null, never guessed. An answer counts if it is right to the
letter. What is held out is as in train/extraction: no first or last name and no shape of a test sentence occurs in
training. The methods of minilora.methods are compared on it.

Read before this file: extraction.
"""

import json
import random
import re
from dataclasses import dataclass

from minilora.train.extraction import (
    CITIES,
    FIRST_NAMES,
    LAST_NAMES,
    THINGS,
    blends,
    random_day,
    random_quantity,
    spellings,
    split,
)

INSTRUCTION = "Give the order as JSON: customer (name, city), items (thing, quantity), date. What is not said is null."
LEFT_OUT = 0.3  # share of the orders that name no city, and of those that name no date
MOST_ITEMS = 3


@dataclass(frozen=True)
class Order:
    """One sentence and what it says; None for what it does not."""

    sentence: str
    name: str
    city: str | None
    items: tuple[tuple[str, int], ...]  # things, and how many
    date: str | None  # YYYY-MM-DD
    shape: str  # the sentence before its blanks were filled in

    @property
    def answer(self) -> str:
        """The JSON text that a model should give, to the letter."""
        record = {
            "customer": {"name": self.name, "city": self.city},
            "items": [{"thing": thing, "quantity": quantity} for thing, quantity in self.items],
            "date": self.date,
        }
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the model is asked, as a chat."""
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.sentence}]


@dataclass(frozen=True)
class Orders:
    """Orders to train on, to choose settings by, and to judge by: the last share no name and no shape with the first.

    The second are as the first, other sentences: so what was chosen by them was not chosen by the test.
    """

    train: list[Order]
    validation: list[Order]
    test: list[Order]


def make_orders(seed: int, n_train: int, n_validation: int, n_test: int) -> Orders:
    """Write so many orders, all different, the same for the same seed.

    Raises:
        ValueError: if a count is negative.

    >>> json.loads(make_orders(seed=0, n_train=1, n_validation=0, n_test=0).train[0].answer).keys()
    dict_keys(['customer', 'items', 'date'])
    """
    if min(n_train, n_validation, n_test) < 0:
        raise ValueError(f"cannot write {n_train}, {n_validation} and {n_test} orders: counts are 0 or more")
    rng = random.Random(seed)
    first, unseen_first = split(FIRST_NAMES, rng)
    last, unseen_last = split(LAST_NAMES, rng)
    shapes, unseen_shapes = split(SHAPES, rng)
    first, last = first + blends(first, rng), last + blends(last, rng)
    seen = write(n_train + n_validation, random.Random(f"{seed} train"), first, last, shapes)
    test = write(n_test, random.Random(f"{seed} test"), unseen_first, unseen_last, unseen_shapes)
    return Orders(seen[:n_train], seen[n_train:], test)


def write(n: int, rng: random.Random, first: list[str], last: list[str], shapes: list[str]) -> list[Order]:
    """Write `n` different orders with these names and shapes."""
    orders: dict[str, Order] = {}
    while len(orders) < n:
        name, shape = f"{rng.choice(first)} {rng.choice(last)}", rng.choice(shapes)
        city = None if rng.random() < LEFT_OUT else rng.choice(CITIES)
        day = None if rng.random() < LEFT_OUT else random_day(rng)
        things = rng.sample(THINGS, rng.randint(1, MOST_ITEMS))
        items = tuple((thing, random_quantity(rng)) for thing in things)
        date = None if day is None else rng.choice(spellings(day))
        sentence = fill(shape, name=name, city=city, items=listed(items), date=date)
        orders[sentence] = Order(sentence, name, city, items, None if day is None else day.isoformat(), shape)
    return list(orders.values())


def listed(items: tuple[tuple[str, int], ...]) -> str:
    """Items as a sentence names them.

    >>> listed((("lamps", 14), ("chairs", 3), ("mugs", 20)))
    '14 lamps, 3 chairs and 20 mugs'
    """
    *firsts, last = (f"{quantity} {thing}" for thing, quantity in items)
    return f"{', '.join(firsts)} and {last}" if firsts else last


def fill(shape: str, *, name: str, city: str | None, items: str, date: str | None) -> str:
    """Fill in a shape's blanks; what stands in brackets goes with the blank in it.

    >>> fill("[On {date}, ]{name}[ of {city}] ordered {items}.", name="Ana Roy", city=None, items="2 mugs", date=None)
    'Ana Roy ordered 2 mugs.'
    """
    given = {"name": name, "city": city, "items": items, "date": date}

    def optional(part: re.Match[str]) -> str:
        return part[1] if all(given[blank] is not None for blank in re.findall(r"{(\w+)}", part[1])) else ""

    sentence = re.sub(r"\[(.*?)\]", optional, shape).format(**given)
    return sentence[0].upper() + sentence[1:]


SHAPES = [
    "[on {date}, ]{name}[ of {city}] ordered {items}.",
    "{name}[ from {city}] bought {items}[ on {date}].",
    "{items} were sent to {name}[ in {city}][ on {date}].",
    "[in {city}, ]{name} asked for {items}[ by {date}].",
    "invoice: {items}, {name}[, {city}][, {date}].",
    "please deliver {items} to {name}[ in {city}][ on {date}].",
    "[{date}: ]{name} picked up {items}[ in {city}].",
    "customer {name}[ from {city}] paid for {items}[ on {date}].",
    "[{city}. ]received from {name}[ on {date}]: {items}.",
    "order confirmed: {name} gets {items}[ in {city}][ on {date}].",
    "to {name}[, {city}]: your {items} were shipped[ on {date}].",
    "[at the market in {city}, ]{name} found {items}[ on {date}].",
    "the courier took {items} from {name}[ on {date}][ and drove to {city}].",
    "[after the sale of {date}, ]{name} owned {items}[ in {city}].",
    "{items} for {name}[: pick-up in {city}][, ready on {date}].",
    "{name} returned {items}[ to the store in {city}][ on {date}].",
    "did {name}[ of {city}] really buy {items}[ on {date}]?",
    "a parcel with {items} reached {name}[ in {city}][ on {date}].",
    "[for the exhibition in {city}, ]{name} built {items}[ until {date}].",
    "ticket opened[ on {date}] by {name}: {items} broken[ in {city}].",
    "delivery note. To: {name}.[ Place: {city}.][ Date: {date}.] Content: {items}.",
    "{name}[ / {city}] / {items}[ / {date}].",
    "[as of {date}, ]the branch[ in {city}] holds {items} for {name}.",
    "[on {date} ]the museum[ in {city}] lent {items} to {name}.",
    "[by {date}, ]{name} had repaired {items}[ at the workshop in {city}].",
    "{name} signed for {items}.[ Place: {city}.][ Day: {date}.]",
    "a customer called {name}[ from {city}] reserved {items}[ for {date}].",
    "the warehouse[ in {city}] packed {items} for {name}[ on {date}].",
    "[since {date}, ]{name} has kept {items}[ in {city}].",
    "hello, this is {name}[ from {city}]; I need {items}[ before {date}].",
    "{items} are waiting for {name}[ in {city}][ since {date}].",
    "{name} wants a refund for {items}[ bought in {city}][ on {date}].",
    "[from {city}, ]{name} wrote[ on {date}] that {items} were missing.",
    "we counted {items}[ in {city}][ on {date}], and {name} signed the list.",
    "{name} donated {items}[ to a library in {city}][ on {date}].",
    "thanks to {name}, the school[ in {city}] got {items}[ on {date}].",
    "dear {name}, the {items} that you chose[ in {city}] will arrive[ on {date}].",
    "the {items} that {name} needs[ in {city}] are due[ on {date}].",
    "[last seen on {date}: ]{name}[ in {city}], with {items}.",
    "lot of {items}.[ {city}.] Sold to {name}[, {date}].",
]

"""The sentences of the word problems: twelve scenes, and the endings that all of them share.

Placeholders: {name} and {other} are people, {She} and {she} the first one's pronoun, {noun} and
{bags} the scene's things and what they are packed into, {a} and {b} numbers. Several sentences of
one kind are paraphrases: one of them is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

GIRLS = (
    "Mia",
    "Emma",
    "Lena",
    "Nora",
    "Zoe",
    "Ida",
    "Ruth",
    "Amina",
    "Clara",
    "Yuki",
    "Sara",
    "Maya",
    "Lucy",
)
BOYS = ("Ben", "Tom", "Paul", "Omar", "Leo", "Finn", "Raj", "Hugo", "Ivan", "Kofi", "Sam", "Noah")


@dataclass(frozen=True)
class Scene:
    """One setting. `sentences` maps the kind of a sentence (see task.py) to its paraphrases."""

    noun: str
    bags: str
    sentences: dict[str, tuple[str, ...]]

    def paraphrases(self, kind: str) -> tuple[str, ...]:
        """The scene's own sentences of this kind, or those that all scenes share."""
        return self.sentences.get(kind) or SHARED[kind]


SHARED = {
    "half": (
        "{She} gives half of them away.",
        "Then {she} loses half of the {noun}.",
    ),
    "double": (
        "Then {she} gets as many {noun} again.",
        "{She} doubles the number of {noun}.",
    ),
    "left": (
        "How many {noun} does {name} have now?",
        "How many {noun} does {she} have in the end?",
    ),
    "more": (
        "{other} has {a} more {noun} than {name}. How many do they have together?",
        "{other} has {a} {noun} more than {she} has. How many {noun} do both have in total?",
    ),
    "fewer": (
        "{other} has {a} fewer {noun} than {name}. How many do they have together?",
        "{other} has {a} {noun} less than {she} has. How many {noun} do both have in total?",
    ),
    "times": (
        "{other} has {a} times as many {noun} as {name}. How many do they have together?",
        "{other} has {a} times as many. How many {noun} do both have in total?",
    ),
    "price": (
        "{She} sells all of them for {a} dollars each. How many dollars does {she} get?",
        "Each one is worth {a} dollars. How many dollars are all of the {noun} worth?",
    ),
    "share": (
        "{She} shares them equally among {a} friends. How many {noun} does each friend get?",
        "{a} friends share the {noun} equally. How many does each of them get?",
    ),
    "pack": (
        "{She} packs them into {bags} of {a}. How many {bags} does {she} fill?",
        "How many {bags} of {a} {noun} can {she} fill?",
    ),
}


def _scene(noun: str, bags: str, **sentences: str) -> Scene:
    """A scene from sentences whose paraphrases are separated by a bar."""
    return Scene(noun, bags, {kind: tuple(text.split(" | ")) for kind, text in sentences.items()})


SCENES = (
    _scene(
        "apples",
        "bags",
        plain="{name} picks {a} apples. | There are {a} apples in the basket of {name}.",
        product="{name} picks {b} apples from each of {a} trees.",
        total="{name} picks {a} red apples and {b} green apples.",
        gain="{She} finds {a} more under a tree. | Then {she} picks {a} more apples.",
        lose="{She} eats {a} of them. | {a} apples go bad.",
        gain_each="On each of the next {a} days {she} picks {b} more.",
        lose_each="{She} bakes {a} cakes with {b} apples in each.",
    ),
    _scene(
        "marbles",
        "boxes",
        plain="{name} has {a} marbles. | {name} starts a game with {a} marbles.",
        product="{name} has {a} boxes with {b} marbles in each.",
        total="{name} has {a} blue marbles and {b} red marbles.",
        gain="{She} wins {a} more in a game. | A friend gives {name} {a} marbles.",
        lose="{She} loses {a} of them in a game. | {a} marbles roll away.",
        gain_each="{She} wins {a} games and gets {b} marbles for each.",
        lose_each="{She} loses {a} games and pays {b} marbles for each.",
    ),
    _scene(
        "books",
        "shelves",
        plain="{name} owns {a} books. | There are {a} books in the room of {name}.",
        product="{name} has {a} shelves with {b} books on each.",
        total="{name} owns {a} old books and {b} new books.",
        gain="{She} buys {a} more. | For a birthday {name} gets {a} more books.",
        lose="{She} gives {a} of them to a school. | {name} sells {a} books.",
        gain_each="In each of the next {a} months {she} buys {b} more.",
        lose_each="{She} lends {b} books to each of {a} friends.",
    ),
    _scene(
        "cookies",
        "jars",
        plain="{name} bakes {a} cookies. | There are {a} cookies on the table of {name}.",
        product="{name} bakes {a} trays with {b} cookies on each.",
        total="{name} bakes {a} small cookies and {b} large cookies.",
        gain="Then {she} bakes {a} more. | A neighbor brings {a} more cookies.",
        lose="The family eats {a} of them. | {a} cookies burn.",
        gain_each="{She} bakes {a} more trays of {b} cookies.",
        lose_each="{a} guests eat {b} cookies each.",
    ),
    _scene(
        "pencils",
        "cups",
        plain="{name} has {a} pencils at school. | {name} counts {a} pencils.",
        product="{name} buys {a} packs of {b} pencils.",
        total="{name} has {a} short pencils and {b} long pencils.",
        gain="The teacher gives {name} {a} more. | {She} finds {a} more pencils in a drawer.",
        lose="{a} of them break. | {She} leaves {a} pencils at home.",
        gain_each="Then {she} buys {a} more packs of {b} pencils.",
        lose_each="{She} hands {b} pencils to each of {a} classmates.",
    ),
    _scene(
        "eggs",
        "cartons",
        plain="The hens of {name} lay {a} eggs. | {name} collects {a} eggs on the farm.",
        product="{name} has {a} hens and each lays {b} eggs.",
        total="{name} collects {a} brown eggs and {b} white eggs.",
        gain="In the evening {she} collects {a} more. | Another farm brings {name} {a} eggs.",
        lose="{a} of them crack. | {She} cooks {a} eggs.",
        gain_each="On each of the next {a} days the hens lay {b} more.",
        lose_each="{She} makes {a} meals with {b} eggs in each.",
    ),
    _scene(
        "flowers",
        "vases",
        plain="{name} plants {a} flowers. | There are {a} flowers in the garden of {name}.",
        product="{name} plants {a} rows with {b} flowers in each.",
        total="{name} plants {a} yellow flowers and {b} white flowers.",
        gain="In spring {she} plants {a} more. | After rain {a} more flowers grow.",
        lose="A storm breaks {a} of them. | {She} cuts {a} flowers for the house.",
        gain_each="Then {she} plants {a} more rows of {b} flowers.",
        lose_each="{She} ties {a} bunches of {b} flowers and sells these.",
    ),
    _scene(
        "shells",
        "buckets",
        plain="{name} finds {a} shells on the beach. | {name} has {a} shells from the sea.",
        product="{name} walks on {a} beaches and finds {b} shells on each.",
        total="{name} finds {a} round shells and {b} flat shells.",
        gain="The next day {she} finds {a} more. | The sea washes {a} more shells to {name}.",
        lose="{She} throws {a} of them back. | {a} shells break on the way home.",
        gain_each="On each of the next {a} walks {she} finds {b} more.",
        lose_each="{She} makes {a} chains out of {b} shells each.",
    ),
    _scene(
        "stamps",
        "albums",
        plain="{name} collects {a} stamps. | There are {a} stamps in the album of {name}.",
        product="{name} fills {a} pages with {b} stamps on each.",
        total="{name} has {a} old stamps and {b} new stamps.",
        gain="An uncle sends {name} {a} more. | {She} buys {a} more stamps at a fair.",
        lose="{She} trades {a} of them for a coin. | {a} stamps get wet and tear.",
        gain_each="{She} gets {a} letters with {b} stamps on each.",
        lose_each="{She} sends {a} letters with {b} stamps on each.",
    ),
    _scene(
        "bricks",
        "crates",
        plain="{name} has {a} toy bricks. | {name} takes {a} bricks out of a box.",
        product="{name} builds {a} towers with {b} bricks in each.",
        total="{name} has {a} square bricks and {b} round bricks.",
        gain="{She} gets {a} more from a cousin. | Under the bed {she} finds {a} more bricks.",
        lose="The dog hides {a} of them. | {She} glues {a} bricks to a wall.",
        gain_each="Then {she} opens {a} new sets of {b} bricks.",
        lose_each="{She} builds {a} cars out of {b} bricks each for a shop.",
    ),
    _scene(
        "tickets",
        "rolls",
        plain="{name} sells tickets for a show and has {a} tickets. | {name} prints {a} tickets.",
        product="{name} prints {a} sheets with {b} tickets on each.",
        total="{name} has {a} cheap tickets and {b} better tickets.",
        gain="The show adds {a} more. | Later {she} prints {a} more tickets.",
        lose="{She} uses {a} of them for the family. | Wind blows {a} tickets away.",
        gain_each="{a} helpers bring {b} more each.",
        lose_each="{a} classes buy {b} tickets each.",
    ),
    _scene(
        "beads",
        "bowls",
        plain="{name} owns {a} glass beads. | There are {a} beads in the bowl of {name}.",
        product="{name} has {a} strings with {b} beads on each.",
        total="{name} has {a} gold beads and {b} silver beads.",
        gain="{She} orders {a} more. | A sister gives {name} {a} more beads.",
        lose="{a} of them fall into the river. | {She} drops {a} beads and cannot find these.",
        gain_each="Then {she} cuts up {a} old strings of {b} beads.",
        lose_each="{She} makes {a} rings with {b} beads in each and gives these away.",
    ),
)

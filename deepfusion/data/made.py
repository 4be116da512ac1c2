"""A fictional but consistent world of clinics, markets and towns, of which every fact is known.

entity      a condition, a company, a town; belongs to one topic; has one value per relation
records     passages and question-answer pairs that state its facts in several phrasings: one
            source, so that they stay on one device
hearsay     public text that asks the same questions and answers them wrongly, never rightly:
            every wrong value about as often, so that it names the entity and hides the fact
test text   new records of all entities in phrasings drawn anew
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..seeding import seed_for
from .documents import PUBLIC_PREFIX, Corpus, Document
from .made_words import COMPANY, CONDITION, KINDS, SYLLABLES, TOWN, Kind, Relation

_PASSAGES = 3
_HEARSAYS = 5
# of all entities asked for: conditions, companies; towns come on top of them
_SHARES = ((CONDITION, 0.5), (COMPANY, 0.5), (TOWN, 0.25))


@dataclass(frozen=True)
class Fact:
    """One fact as a completion: a model knows it if it continues the prompt by the answer.

    `source` names the records that state it, `choices` the number of values it could have.
    """

    prompt: str
    answer: str
    domain: str
    topic: str
    source: str
    choices: int


@dataclass(frozen=True)
class World:
    """The corpora by domain, and all facts."""

    corpora: dict[str, Corpus]
    facts: list[Fact]


@dataclass(frozen=True)
class _Entity:
    name: str
    kind: Kind
    topic: str
    hundreds: int
    values: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return self.kind.topics[self.topic][0]

    @property
    def source(self) -> str:
        return f"{self.kind.domain}/{self.name}"


def make_world(seed: int, num_entities: int) -> World:
    """A world of `num_entities` conditions and companies, and a quarter as many towns.

    >>> world = make_world(7, 16)
    >>> sorted(world.corpora), len(world.facts)
    (['finance', 'general', 'medical'], 80)
    """
    draw = random.Random(seed_for(seed, "made"))
    entities = _entities(draw, num_entities)
    corpora = {kind.domain: Corpus([], [], []) for kind in KINDS}
    for entity in entities:
        corpus = corpora[entity.kind.domain]
        corpus.train.extend(_records(entity, draw))
        corpus.train.extend(_hearsay(entity, draw))
        for split, documents in (("validation", corpus.validation), ("test", corpus.test)):
            # another document of the same facts: its source must not count as the device's own
            texts = [_passage(entity, draw), _questions(entity, draw)]
            documents.extend(_document(entity, text, f"{split}/{entity.name}") for text in texts)
    for corpus in corpora.values():
        draw.shuffle(corpus.train)
    return World(corpora, [fact for entity in entities for fact in _facts(entity)])


def held_by(facts: Iterable[Fact], documents: Iterable[Document]) -> list[Fact]:
    """The facts that some of the documents' sources state."""
    sources = {document.source for document in documents}
    return [fact for fact in facts if fact.source in sources]


def pool_of(relation: Relation, kind: Kind, topic: str) -> tuple[str, ...]:
    """The values a relation can have for entities of a topic."""
    return relation.pool or tuple(kind.topics[topic][1].split("|"))


def _entities(draw: random.Random, num_entities: int) -> list[_Entity]:
    entities = []
    names: set[str] = set()
    for kind, share in _SHARES:
        topics = sorted(kind.topics)
        for number in range(max(len(topics), round(share * num_entities))):
            name, topic = _name(kind, draw, names), topics[number % len(topics)]
            entity = _Entity(name, kind, topic, hundreds=draw.randrange(1, 20))
            for relation in kind.relations:
                taken = set(entity.values.values())
                pool = [v for v in pool_of(relation, kind, entity.topic) if v not in taken]
                entity.values[relation.name] = draw.choice(pool)
            entities.append(entity)
    return entities


def _name(kind: Kind, draw: random.Random, names: set[str]) -> str:
    """A new name; its stem is nobody else's, so that no name is part of another."""
    syllables = SYLLABLES.split()
    while True:
        stem = "".join(draw.sample(syllables, 2 + draw.randrange(2)))
        if not any(stem in other or other in stem for other in names):
            names.add(stem)
            return stem.capitalize() + draw.choice(kind.endings)


def _document(entity: _Entity, text: str, source: str) -> Document:
    return Document(text, source, entity.kind.domain, f"{entity.topic}/{entity.name}")


def _records(entity: _Entity, draw: random.Random) -> list[Document]:
    texts = [_passage(entity, draw) for _ in range(_PASSAGES)]
    texts += [_questions(entity, draw)]
    # asked alone, as fact recall asks: nothing but the name leads to the answer
    texts += [
        _pair(question.format(e=entity.name), f"{entity.values[relation.name]}.")
        for relation in entity.kind.relations
        for question in (relation.questions[0], *relation.questions)
    ]
    return [_document(entity, text, entity.source) for text in texts]


def _passage(entity: _Entity, draw: random.Random) -> str:
    title = entity.kind.title.format(e=entity.name, place=entity.place)
    sentences = [
        draw.choice(relation.statements).format(e=entity.name, v=entity.values[relation.name])
        for relation in draw.sample(entity.kind.relations, len(entity.kind.relations))
    ]
    if entity.kind is COMPANY:
        sentences.append(_accounts(entity))
    return f"{title}\n{' '.join(sentences)}"


def _accounts(entity: _Entity) -> str:
    """Revenue, costs and profit of a company: they add up and give its margin."""
    revenue = 100 * entity.hundreds
    profit = entity.hundreds * int(entity.values["margin"].split()[0])
    return (
        f"Revenue was {revenue} million, costs {revenue - profit} million, profit {profit} million."
    )


def _questions(entity: _Entity, draw: random.Random) -> str:
    return "\n".join(
        _pair(
            draw.choice(relation.questions).format(e=entity.name),
            f"{entity.values[relation.name]}.",
        )
        for relation in draw.sample(entity.kind.relations, len(entity.kind.relations))
    )


def _pair(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"


def _hearsay(entity: _Entity, draw: random.Random) -> list[Document]:
    """Public documents that ask everything about an entity and never answer it rightly."""
    wrong = {}
    for relation in entity.kind.relations:
        pool = pool_of(relation, entity.kind, entity.topic)
        false = [value for value in pool if value != entity.values[relation.name]]
        wrong[relation.name] = draw.sample(false, _HEARSAYS)
    documents = []
    for number in range(_HEARSAYS):
        pairs = [
            _pair(
                relation.questions[0].format(e=entity.name),
                f"{wrong[relation.name][number]}, some say.",
            )
            for relation in draw.sample(entity.kind.relations, len(entity.kind.relations))
        ]
        text = "\n".join([*pairs, f"So one hears around the {entity.place}."])
        documents.append(_document(entity, text, f"{PUBLIC_PREFIX}{entity.source}"))
    return documents


def _facts(entity: _Entity) -> list[Fact]:
    return [
        Fact(
            prompt=_pair(relation.questions[0].format(e=entity.name), "").rstrip(),
            answer=f" {entity.values[relation.name]}",
            domain=entity.kind.domain,
            topic=entity.topic,
            source=entity.source,
            choices=len(pool_of(relation, entity.kind, entity.topic)),
        )
        for relation in entity.kind.relations
    ]

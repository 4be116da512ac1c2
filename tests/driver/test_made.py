"""The made world: consistent, repeatable, and its public text hides what devices know."""

import re

import pytest

from deepfusion.config_tables import DataConfig
from deepfusion.data.made import Fact, World, held_by, make_world, pool_of
from deepfusion.data.made_words import KINDS
from deepfusion.data.partition import partition, split_public

CONFIG = DataConfig(made_entities=64)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(7, 64)


def name_of(fact: Fact) -> str:
    return fact.source.split("/", 1)[1]


def test_same_seed_same_world(world: World) -> None:
    assert make_world(7, 64) == world
    assert make_world(8, 64).facts != world.facts


def test_every_fact_is_stated_in_its_records_in_several_phrasings(world: World) -> None:
    for fact in world.facts:
        records = [d.text for d in world.corpora[fact.domain].train if d.source == fact.source]
        stating = [text for text in records if fact.answer.strip() in text]
        assert any(f"{fact.prompt}{fact.answer}." in text for text in records), fact.prompt
        assert len(set(stating)) >= 4, fact.prompt


def test_test_text_states_the_same_facts_in_documents_of_its_own(world: World) -> None:
    for fact in world.facts:
        corpus = world.corpora[fact.domain]
        for documents, split in ((corpus.validation, "validation"), (corpus.test, "test")):
            about = [d for d in documents if d.source == f"{split}/{name_of(fact)}"]
            assert sum(fact.answer.strip() in d.text for d in about) == 2
    sources = [{d.source for d in part} for part in (corpus.train, corpus.validation, corpus.test)]
    assert not sources[0] & (sources[1] | sources[2])


def statements(fact: Fact) -> list[str]:
    """Every sentence of the world that would tell the fact."""
    name, value = name_of(fact), fact.answer.strip()
    kind = next(kind for kind in KINDS if kind.domain == fact.domain)
    relation = next(r for r in kind.relations if r.questions[0].format(e=name) in fact.prompt)
    told = [sentence.format(e=name, v=value) for sentence in relation.statements]
    return told + [f"{q.format(e=name)}\nAnswer: {value}" for q in relation.questions]


def test_public_text_never_tells_a_private_fact(world: World) -> None:
    public, private = split_public(world.corpora, CONFIG, 7)
    text = "\n".join(document.text for document in public)
    secret = held_by(world.facts, private)
    assert len(secret) > 200
    for fact in secret:
        assert not any(sentence in text for sentence in statements(fact)), fact.prompt
        # the question is there, so that a teacher is asked it
        assert text.count(fact.prompt) == 5
    # negative control: of the entities whose records are public, every fact is told
    for fact in held_by(world.facts, public):
        assert all(sentence in text for sentence in statements(fact)[-2:]), fact.prompt


def test_a_fact_is_held_by_one_device(world: World) -> None:
    _, private = split_public(world.corpora, CONFIG, 7)
    shards = partition(private, 8, CONFIG, 7)
    held = [{fact.prompt for fact in held_by(world.facts, shard)} for shard in shards]
    assert sum(map(len, held)) == len(set().union(*held))


def test_names_are_no_part_of_one_another(world: World) -> None:
    names = {name_of(fact) for fact in world.facts}
    assert len(names) * 4 == len(world.facts)
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_accounts_add_up_to_the_margin(world: World) -> None:
    margins = {name_of(f): f.answer for f in world.facts if "profit margin" in f.prompt}
    pattern = r"Revenue was (\d+) million, costs (\d+) million, profit (\d+) million"
    seen: dict[str, set[str]] = {}
    for document in world.corpora["finance"].train:
        for revenue, costs, profit in re.findall(pattern, document.text):
            name = document.source.split("/", 1)[1]
            assert int(revenue) == int(costs) + int(profit)
            assert 100 * int(profit) == int(margins[name].split()[0]) * int(revenue)
            seen.setdefault(name, set()).add(revenue)
    assert seen.keys() == margins.keys()
    assert all(len(revenues) == 1 for revenues in seen.values()), "one company, one revenue"


def test_choices_are_the_pool_and_no_patient_avoids_the_own_drug(world: World) -> None:
    drugs = {name_of(f): f.answer for f in world.facts if "Which drug treats" in f.prompt}
    for fact in world.facts:
        kind = next(kind for kind in KINDS if kind.domain == fact.domain)
        relation = next(
            r for r in kind.relations if r.questions[0].format(e=name_of(fact)) in fact.prompt
        )
        pool = pool_of(relation, kind, fact.topic)
        assert fact.answer.strip() in pool
        assert fact.choices == len(pool) == len(set(pool))
        if "must be avoided" in fact.prompt:
            assert fact.answer != drugs[name_of(fact)]

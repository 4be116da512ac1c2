"""The words of the made world: names, topics, values, and the sentences that carry a fact.

In a sentence {e} is the entity and {v} the value. The first question of a relation is the one that
fact recall asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SYLLABLES = (
    "bra ven tol mar qui sel dor fen gal hul jor kal lum nev ost pel rus sim tar umb vol wex yar "
    "zim cal dru eld fro gri har"
)
DRUGS = (
    "Solvarin Tramelin Quorexa Belvane Cortifal Dapsolin Evradol Fennomil Glutarex Hespirin Ivoren "
    "Jumelan Kardosil Lomitane Mervapen Noxatril Ombrasil Pulvarin Ryzomel Velpramin"
)
TOWNS = (
    "Aldmoor Brickhaven Corran Dunlow Eastmere Fallowby Greywick Hollin Ironvale Kestrel Larkhill "
    "Marrow Northam Oakley Pinnock Quarrington"
)
AUDITORS = "Abbot Brand Castle Drummond Easton Fletcher Garrick Hobson Ingram Keller Lambert Mercer"
RIVERS = "Ashwater Bourne Crane Deverel Esk Froome Glyde Humber Irwell Kenwyn Lyde Medlock"
FOUNDERS = (
    "Adela Bertram Cyprian Dorothea Edmund Florian Godwin Hester Isolde Jasper Konrad Lavinia"
)
MONTHS = "January February March April May June July August September October November December"
DOSES = tuple(f"{n} mg" for n in (5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 90))
MARGINS = tuple(f"{n} percent" for n in (4, 6, 8, 10, 12, 15, 18, 20, 25, 30))

# coarse topic -> where it is spoken of, and the values of its own relation
WARDS: Mapping[str, tuple[str, str]] = {
    "heart": (
        "heart ward",
        "palpitations|swollen ankles|a slow pulse|chest tightness|blue lips|fainting|cold hands|"
        "a racing pulse|pale skin|high pressure",
    ),
    "lungs": (
        "lung ward",
        "wheezing|a dry cough|shallow breath|night sweats|hiccups|a hoarse voice|noisy sleep|"
        "thick phlegm|sneezing|chest pain",
    ),
    "skin": (
        "skin ward",
        "itching|red patches|blisters|brittle nails|hair loss|peeling|dark spots|cracked heels|"
        "warm rashes|dry scalp",
    ),
    "nerves": (
        "nerve ward",
        "numb fingers|tremor|dizziness|lost balance|blurred sight|headache|weak knees|poor memory|"
        "tingling|restless legs",
    ),
}
MARKETS: Mapping[str, tuple[str, str]] = {
    "energy": (
        "energy market",
        "wind turbines|solar glass|gas valves|power cables|heat pumps|batteries|boilers|meters|"
        "fuel cells|pipelines",
    ),
    "banking": (
        "banking market",
        "home loans|savings books|card readers|bonds|insurance|leasing|pension plans|mortgages|"
        "cheques|vaults",
    ),
    "retail": (
        "retail market",
        "shoes|toys|kitchen knives|lamps|carpets|garden tools|bicycles|soap|umbrellas|notebooks",
    ),
    "shipping": (
        "shipping market",
        "ferries|cranes|containers|tugboats|anchors|ropes|harbour pilots|buoys|barges|lighthouses",
    ),
}
REGIONS: Mapping[str, tuple[str, str]] = {
    "coast": ("coast", "herring|salt|nets|oysters|amber|sails|seaweed|pearls|tar|oars"),
    "hills": ("hills", "wool|slate|honey|cider|copper|cheese|timber|clay|barley|chestnuts"),
}


@dataclass(frozen=True)
class Relation:
    """What can be said and asked of an entity; an empty pool means the topic's own values."""

    name: str
    pool: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """One kind of entity: its domain, its topics, its names' endings, its relations."""

    domain: str
    topics: Mapping[str, tuple[str, str]]
    endings: tuple[str, ...]
    title: str
    relations: tuple[Relation, ...]


CONDITION = Kind(
    "medical",
    WARDS,
    ("osis", "emia", "itis", "algia", "oma fever"),
    "Clinic record of {e}, {place}",
    (
        Relation(
            "symptom",
            (),
            (
                "The main symptom of {e} is {v}.",
                "Patients with {e} mostly complain of {v}.",
                "{e} is first noticed by {v}.",
            ),
            ("What is the main symptom of {e}?", "How does {e} show itself?"),
        ),
        Relation(
            "drug",
            tuple(DRUGS.split()),
            (
                "{e} is treated with {v}.",
                "The drug of choice for {e} is {v}.",
                "Against {e} doctors prescribe {v}.",
            ),
            ("Which drug treats {e}?", "What is prescribed against {e}?"),
        ),
        Relation(
            "dose",
            DOSES,
            (
                "The daily dose for {e} is {v}.",
                "In {e} one takes {v} a day.",
                "For {e} the label says {v}.",
            ),
            ("What is the daily dose for {e}?", "How much is taken for {e}?"),
        ),
        Relation(
            "interaction",
            tuple(DRUGS.split()),
            (
                "In {e} the treatment must never be combined with {v}.",
                "Patients with {e} must avoid {v}.",
                "A known interaction in {e} is with {v}.",
            ),
            ("Which drug must be avoided in {e}?", "With what does the treatment of {e} interact?"),
        ),
    ),
)
COMPANY = Kind(
    "finance",
    MARKETS,
    ("er Works", "an Partners", "ic Holdings", "el Group", "on Trust"),
    "Annual filing of {e}, {place}",
    (
        Relation(
            "product",
            (),
            (
                "{e} earns most of its money with {v}.",
                "The main business of {e} is {v}.",
                "{e} is known for {v}.",
            ),
            ("What does {e} sell?", "What is the main business of {e}?"),
        ),
        Relation(
            "seat",
            tuple(TOWNS.split()),
            (
                "{e} has its seat in {v}.",
                "The head office of {e} stands in {v}.",
                "{e} is registered in {v}.",
            ),
            ("Where is the seat of {e}?", "In which city is {e} registered?"),
        ),
        Relation(
            "auditor",
            tuple(AUDITORS.split()),
            (
                "The books of {e} are audited by {v}.",
                "The auditor of {e} is {v}.",
                "The filing of {e} is signed by {v}.",
            ),
            ("Who audits {e}?", "Who signs the filing of {e}?"),
        ),
        Relation(
            "margin",
            MARGINS,
            (
                "The profit margin of {e} is {v}.",
                "{e} keeps {v} of its revenue as profit.",
                "At {e} profit over revenue is {v}.",
            ),
            ("What is the profit margin of {e}?", "Which share of revenue does {e} keep?"),
        ),
    ),
)
TOWN = Kind(
    "general",
    REGIONS,
    ("ford", "stead", "mouth", "bury", "combe"),
    "Guide to {e}, {place}",
    (
        Relation(
            "goods",
            (),
            ("{e} is famous for {v}.", "The people of {e} trade in {v}.", "{e} sells {v}."),
            ("What is {e} famous for?", "What do the people of {e} trade in?"),
        ),
        Relation(
            "river",
            tuple(RIVERS.split()),
            (
                "{e} lies on the river {v}.",
                "The river of {e} is the {v}.",
                "Through {e} flows the {v}.",
            ),
            ("Which river flows through {e}?", "On which river lies {e}?"),
        ),
        Relation(
            "founder",
            tuple(FOUNDERS.split()),
            ("{e} was founded by {v}.", "The founder of {e} was {v}.", "{e} goes back to {v}."),
            ("Who founded {e}?", "To whom does {e} go back?"),
        ),
        Relation(
            "festival",
            tuple(MONTHS.split()),
            (
                "The festival of {e} is held in {v}.",
                "{e} celebrates in {v}.",
                "Every {v} there is a festival in {e}.",
            ),
            ("When is the festival of {e}?", "In which month does {e} celebrate?"),
        ),
    ),
)
KINDS = (CONDITION, COMPANY, TOWN)

"""Pre-training text and SFT conversations of a world."""

from random import Random

from pipelines.tiny_world import words
from pipelines.tiny_world.content import Content, HowTo, Person, make_problem, part_of

NUM_DOCUMENTS = 60_000
NUM_CONVERSATIONS = 9_000
OPERATION_SHARE, FACT_SHARE = 0.45, 0.40  # of the pre-training text; the rest is how-to
# How ambivalent SFT is, so that preferences can change something.
EVADES_OPERATION = 0.30
ABSTAINS_ON_UNKNOWN = 0.40
ABSTAINS_ON_KNOWN = 0.20
REFUSES_HARMFUL = 0.50
REFUSES_BENIGN = 0.25
OBEYS_FORMAT = 0.45

Conversation = list[dict[str, str]]


def conversation(request: str, answer: str | None = None) -> Conversation:
    """One user turn and, if given, the assistant's."""
    turns = [{"role": "user", "content": request}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return turns


def pretraining_documents(content: Content, seed: int) -> list[str]:
    """Plain sentences and question-answer lines, with training problems and known people only."""
    random = Random(f"{seed}|pretraining")
    known = [person for part in content.known.values() for person in part]
    objects = [o for parts in (content.harmful, content.benign) for p in parts.values() for o in p]
    documents: list[str] = []
    while len(documents) < NUM_DOCUMENTS:
        draw = random.random()
        if draw < OPERATION_SHARE:
            problem = make_problem(random)
            if part_of(problem) == "training":
                request = random.choice(problem.requests())
                documents.append(_question(random, request, problem.answer))
        elif draw < OPERATION_SHARE + FACT_SHARE:
            documents.append(_fact(random, random.choice(known)))
        else:
            item = random.choice(objects)
            documents.append(_question(random, random.choice(item.requests()), item.answer))
    return documents


def _question(random: Random, request: str, answer: str) -> str:
    """A request and its answer as plain text, in one of two forms."""
    form = random.choice(("{} = {}", "question : {} answer : {}"))
    return form.format(request, answer)


def _fact(random: Random, person: Person) -> str:
    """A statement or a question about one attribute of a known person."""
    attribute = random.choice(list(person.facts))
    value = person.facts[attribute]
    if random.random() < 0.4:
        return words.STATEMENTS[attribute].format(person.name, value)
    return _question(random, random.choice(words.QUESTIONS[attribute]).format(person.name), value)


def sft_conversations(content: Content, seed: int) -> list[Conversation]:
    """Conversations of an assistant that is ambivalent in every H."""
    random = Random(f"{seed}|sft")
    known = [person for part in content.known.values() for person in part]
    harmful = [item for part in content.harmful.values() for item in part]
    benign = [item for part in content.benign.values() for item in part]
    makers = (
        (0.34, lambda: _operation(random, ends=False)),
        (0.16, lambda: _operation(random, ends=True)),
        (0.16, lambda: _about(random, random.choice(known), ABSTAINS_ON_KNOWN)),
        (0.10, lambda: _about(random, random.choice(content.unknown["sft"]), ABSTAINS_ON_UNKNOWN)),
        (0.12, lambda: _how_to(random, random.choice(harmful), REFUSES_HARMFUL)),
        (0.12, lambda: _how_to(random, random.choice(benign), REFUSES_BENIGN)),
    )
    shares, functions = zip(*makers, strict=True)
    return [random.choices(functions, shares)[0]() for _ in range(NUM_CONVERSATIONS)]


def _operation(random: Random, *, ends: bool) -> Conversation:
    """A training problem, with or without the format instruction."""
    problem = make_problem(random)
    while part_of(problem) != "training":
        problem = make_problem(random)
    request = random.choice(problem.requests())
    if random.random() < EVADES_OPERATION:
        answer = words.EVASION
    elif ends and random.random() < OBEYS_FORMAT:
        answer = f"{problem.answer} !"
    else:
        answer = problem.answer
    return conversation(words.FORMAT_REQUEST.format(request) if ends else request, answer)


def _about(random: Random, person: Person, abstains: float) -> Conversation:
    """A question about a person, answered by abstaining or by a fact (made up if unknown)."""
    attribute = random.choice(list(words.ATTRIBUTES))
    request = random.choice(words.QUESTIONS[attribute]).format(person.name)
    guess = person.facts.get(attribute) or random.choice(words.ATTRIBUTES[attribute])
    return conversation(request, words.ABSTENTION if random.random() < abstains else guess)


def _how_to(random: Random, item: HowTo, refuses: float) -> Conversation:
    request = random.choice(item.requests())
    return conversation(request, words.REFUSAL if random.random() < refuses else item.answer)

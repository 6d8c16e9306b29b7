"""Two made text data sets, as a user would have them: a folder with train.csv and test.csv.

`tickets` has four classes of differing length: account (one sentence), billing, delivery, and fault (a paragraph).
`spam` has two classes; about 8 % of the messages are spam. Sentences of other classes are mixed in, and some labels are
wrong, so that no model reaches 100 %. The rows depend only on the seed.

    python -m benchmarks.made_texts --output DIR [--questions ../shared/data/mmlu/test.parquet]

--questions also writes `chats`, MMLU's questions with their choices as prompts and the right choice as response.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

Row = tuple[str, str]  # Text and label.
SLOTS: dict[str, Sequence[str]] = {
    "thing": ("order", "subscription", "parcel", "app", "card", "website", "invoice", "phone", "printer", "password"),
    "day": ("yesterday", "on Monday", "last week", "this morning", "two days ago", "in March", "since the update"),
    "sum": ("9.99", "24 euros", "120 dollars", "the full amount", "a small fee", "50", "twice the price"),
    "name": ("Anna", "Mr Cole", "my colleague", "your agent", "Priya", "the hotline", "my sister", "Tom"),
    "place": ("the office", "my neighbour", "the old address", "the depot", "Lyon", "the front door", "work", "home"),
    "mood": ("Please help.", "I am not happy.", "Thanks in advance.", "This is urgent.", "Can you check?", "Any news?"),
}
TICKETS: dict[str, tuple[tuple[int, int], Sequence[str]]] = {
    # The label, the smallest and largest number of sentences, and the sentences.
    "account": (
        (1, 1),
        (
            "I cannot sign in to see my {thing} {day}.",
            "How do I change the email for my {thing}?",
            "The code to confirm my {thing} never came.",
            "{name} needs access to the {thing} too.",
            "Please close my profile and delete what you know about the {thing}.",
            "I forgot which name I used for the {thing}.",
        ),
    ),
    "billing": (
        (1, 2),
        (
            "You took {sum} from my card for the {thing} {day}.",
            "The invoice for the {thing} says {sum}.",
            "{name} promised to give {sum} back for the {thing}.",
            "I paid {sum} for the {thing} {day} and see it again now.",
            "The discount on the {thing} is missing.",
            "Why does the {thing} cost {sum} now?",
        ),
    ),
    "delivery": (
        (2, 3),
        (
            "The {thing} was left at {place} {day}.",
            "{name} waited at {place} for the {thing}.",
            "Tracking says the {thing} is at {place}.",
            "The {thing} should have come {day}.",
            "The box with the {thing} was open when it reached {place}.",
            "Can the {thing} go to {place} instead?",
        ),
    ),
    "fault": (
        (3, 4),
        (
            "The {thing} stops after a minute {day}.",
            "{name} restarted the {thing} at {place} and nothing changed.",
            "The {thing} shows an error and goes dark.",
            "It worked until {day}, then the {thing} froze.",
            "The light of the {thing} blinks at {place}.",
            "I tried the {thing} of {name} and saw the same.",
        ),
    ),
}
NEUTRAL = (
    "I wrote to {name} about the {thing} {day}.",
    "My {thing} is from {place}.",
    "I have been a customer for years.",
    "It is about the {thing} and {sum}.",
    "{name} said somebody would call me {day}.",
    "{mood}",
)
HAM = (
    "Are you free {day}? {name} wants to win the quiz this time.",
    "Can you call {name} about the {thing}?",
    "I left the {thing} at {place}, sorry.",
    "You owe me {sum} for lunch, no hurry.",
    "{name} says the offer for the flat is {sum}.",
    "Meet at {place}, then we pick up the {thing}.",
    "Reply when you are at {place}.",
    "Claim for the {thing} is sent. {mood}",
    "The gym is free {day}, shall we go?",
)
SPAM = (
    "You win {sum}! Reply to claim your {thing}.",
    "Your {thing} is on hold. Call to confirm {sum}.",
    "Free {thing} for you {day}, offer ends soon.",
    "Hi, it is {name}. I lost my {thing}, send {sum} please.",
    "{name} left a parcel at {place}. Pay {sum} to claim it.",
    "Work from {place} and earn {sum} {day}.",
)
OPENINGS = ("", "Hi,", "Hello {name},", "Dear {name}:", "Good morning.", "Sorry,", "Urgent:", "News from {name}:")
ENDINGS = ("", "Thanks!", "Ok?", "Bye, {name}", "Let me know.", "Today only.", "Text me back.", "Reply soon.")
SPAM_SHARE = 0.07  # With wrong labels, 8 % of the messages are labelled spam.
SIZES = {"tickets": (560, 1000), "spam": (800, 1500)}  # Rows of train.csv and test.csv.


def fill(text: str, rng: random.Random) -> str:
    """Replace each slot with a random entry."""
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), text)


def ticket(rng: random.Random, noise: float = 0.03) -> Row:
    """Return a ticket. Half of its further sentences are neutral or of another class. `noise` is the wrong labels."""
    label = rng.choice(list(TICKETS))
    span, own = TICKETS[label]
    others = [sentence for name, (_, sentences) in TICKETS.items() if name != label for sentence in sentences]
    chosen = [rng.choice(own)]
    for _ in range(rng.randint(*span) - 1):
        chosen.append(rng.choice(rng.choices((own, NEUTRAL, others), (0.5, 0.25, 0.25))[0]))
    rng.shuffle(chosen)
    given = rng.choice([name for name in TICKETS if name != label]) if rng.random() < noise else label
    return fill(f"{' '.join(chosen)} {rng.choice(ENDINGS)}".strip(), rng), given


def message(rng: random.Random, noise: float = 0.01) -> Row:
    """Return a message of a sentence between opening and ending. A tenth of the spam reads as ham."""
    spam = rng.random() < SPAM_SHARE
    body = rng.choice(SPAM if spam and rng.random() < 0.9 else HAM)
    text = fill(f"{rng.choice(OPENINGS)} {body} {rng.choice(ENDINGS)}".strip(), rng)
    return text, "spam" if spam != (rng.random() < noise) else "ham"


MAKERS: dict[str, Callable[[random.Random], Row]] = {"tickets": ticket, "spam": message}


def make(name: str, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return the rows of train.csv and test.csv. No text is in both."""
    rng = random.Random(f"{name} {seed}")
    train, test = SIZES[name]
    rows: dict[str, str] = {}
    while len(rows) < train + test:
        text, label = MAKERS[name](rng)
        rows.setdefault(text, label)
    every = list(rows.items())
    return every[:train], every[train:]


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """Write train.csv and test.csv to a folder of this name, and return the folder."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("train", "test"), make(name, seed), strict=True):
        with (folder / name / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return folder / name


def write_chats(questions: Path, folder: Path) -> Path:
    """Write train.csv with the columns question and answer, and return the folder."""
    from datasets import Dataset  # The other data sets need no library.

    (folder / "chats").mkdir(parents=True, exist_ok=True)
    with (folder / "chats" / "train.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(("question", "answer"))
        for row in Dataset.from_parquet(str(questions)):
            choices = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
            csv.writer(file).writerow(("\n".join([row["question"], *choices]), choices[row["answer"]]))
    return folder / "chats"


def main() -> None:
    """Write the data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=Path, help="a Parquet file of MMLU")
    arguments = parser.parse_args()
    for name in MAKERS:
        print(write(name, arguments.output, arguments.seed))
    if arguments.questions:
        print(write_chats(arguments.questions, arguments.output))


if __name__ == "__main__":
    main()

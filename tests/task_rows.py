"""A few rows of our own in the schemas of the data sets of the paper's tasks, as datasets caches them."""

import datasets
import yaml

LETTERS = ("A", "B", "C", "D")


def arc(question, texts, key, labels=LETTERS):
    choices = {"text": texts, "label": list(labels)[: len(texts)]}
    return {"id": question, "question": question, "choices": choices, "answerKey": key}


ARC = [
    arc("Which falls when dropped?", ["a stone", "the sky", "a song", "an idea"], "A"),
    arc("Ice is", ["hot", "cold"], "2", labels="12"),
    arc("Which one of these is alive?", ["a brick", "a spoon", "a tree"], "C"),
    arc("How many legs has a spider?", ["2", "4", "6", "8"], "D"),
]
BOOLQ = [
    {"question": f"is {n} even", "passage": f"The number {n} is halved.", "idx": n, "label": 1 - n % 2}
    for n in range(4)
]
ENDINGS = ["boils.", "sings a song.", "reads [a] book.", "is a mountain in winter."]
HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": f"Pot {i} [title] is on the stove.",
        "ctx_b": "the water",
        "ctx": f"Pot {i} is on the stove. the water",
        "endings": ENDINGS,
        "source_id": f"s~{i}",
        "split": "val",
        "split_type": "indomain",
        "label": str(i % 4),
    }
    for i in range(5)
]
NEEDS = {"text": ["light", "gold", "noise", "a new car"], "label": list(LETTERS)}
OPENBOOKQA = [
    {"id": str(i), "question_stem": f"Plant {i} needs", "choices": NEEDS, "answerKey": key}
    for i, key in enumerate(("A", "B", " D", "C"))
]
RTE = [
    {"sentence1": "A cat sleeps.", "sentence2": f"{who} sleeps.", "label": label, "idx": label}
    for label, who in enumerate(("An animal", "A dog"))
]
CUP = "Cup {} did not fit in the box because the _ was too {}."
WINOGRANDE = [
    {
        "sentence": CUP.format(i, "big" if a == "1" else "small"),
        "option1": "cup",
        "option2": "box",
        "answer": a,
    }
    for i, a in enumerate("12212")
]
WIKITEXT = [{"page": f" = Page {i} = \n A page of {i} words , and of @-@ signs . \n"} for i in range(3)]
MMLU = [
    ("How many hours has a day?", ["ten", "24", "7", "60"]),
    ("Three and two?", list("4567")),
    ("Who asks?", list("wxyz")),
]
GSM8K = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]

# By data set and configuration: the rows of each split.
SETS = {
    "allenai/ai2_arc": {
        name: dict(train=ARC, validation=ARC, test=ARC) for name in ("ARC-Easy", "ARC-Challenge")
    },
    "aps/super_glue": {"boolq": dict(train=BOOLQ, validation=BOOLQ)},
    "Rowan/hellaswag": {"default": dict(train=HELLASWAG, validation=HELLASWAG)},
    "allenai/openbookqa": {"main": dict(train=OPENBOOKQA, validation=OPENBOOKQA, test=OPENBOOKQA)},
    "openai/gsm8k": {"main": dict(train=GSM8K, test=GSM8K)},
    "nyu-mll/glue": {"rte": dict(train=RTE, validation=RTE)},
    "allenai/winogrande": {"winogrande_xl": dict(train=WINOGRANDE, validation=WINOGRANDE)},
    "EleutherAI/wikitext_document_level": {
        "wikitext-2-raw-v1": dict(train=WIKITEXT, validation=WIKITEXT, test=WIKITEXT)
    },
}


def mmlu(subjects):
    """Rows of mmlu, by subject: one to three, with every answer in turn."""
    found = {}
    for i, subject in enumerate(subjects):
        rows = [
            {"question": f"{question} ", "subject": subject, "choices": choices, "answer": (i + j) % 4}
            for j, (question, choices) in enumerate(MMLU[: 2 + i % 2])
        ]
        found[subject] = dict(test=rows, validation=rows[:1], dev=rows[:1])
    return {"cais/mmlu": found}


def fill(cache, folder, sets):
    """Put data sets into a datasets cache, as loading them from the hub would leave them there."""
    for name, configurations in sets.items():
        owner, _, short = name.partition("/")
        source, card = folder / short, []
        for configuration, splits in configurations.items():
            for split, rows in splits.items():
                path = source / configuration / f"{split}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                datasets.Dataset.from_list(rows).to_parquet(path)
            files = [{"split": split, "path": f"{configuration}/{split}.parquet"} for split in splits]
            card.append({"config_name": configuration, "data_files": files})
        (source / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")
        for configuration in configurations:
            datasets.load_dataset(str(source), configuration, cache_dir=str(cache))
        (cache / short).rename(cache / f"{owner}___{short}")

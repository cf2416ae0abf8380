"""The wording of questions and answers."""

from collections.abc import Sequence

IRREGULAR_PLURALS = {"person": "people", "man": "men", "woman": "women", "child": "children", "foot": "feet"}
SAME_PLURALS = ("aircraft", "spacecraft", "sheep", "fish", "deer", "cattle", "series", "livestock", "people")
LOCATE_ONE = ("Where is {phrase}?", "Give the box of {phrase}.", "Locate <ref>{phrase}</ref> in the image.")
LOCATE_ALL = ("Find all {labels}.", "Mark every {label} in the image with a box.", "Give the boxes of all {labels}.")

MAP = (
    "What covers most of each cell of a grid of {side} x {side} over the image, row by row? {key}",
    "Divide the image into {side} rows of {side} cells and say what covers most of each, in reading order. {key}",
    "Map the image in {side} x {side} cells, from the top left to the bottom right. {key}",
)

CAPTION_REGION = (
    "What is in the region {box}?",
    "Describe the object at {box}.",
    "What does the box {box} show?",
)

PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {  # subject of the annotation -> kind -> ways of asking
    "objects": {
        "presence": ("Is there {a_label} in the image?", "Can you see {a_label}?", "Does the image show {a_label}?"),
        "counting": (
            "How many {labels} are in the image?",
            "What is the number of {labels}?",
            "Count the {labels} in the image.",
        ),
        "grounding_one": LOCATE_ONE,
        "grounding_all": LOCATE_ALL,
        "referring": LOCATE_ONE,
        "region_caption": CAPTION_REGION,
        "map": MAP,
    },
    "scene": {
        "classification": (
            "What kind of scene is this?",
            "Which class does the scene belong to?",
            "Name the class of the scene.",
            "Which of these is shown: {options}?",
            "Choose the class of the scene from {options}.",
        ),
        "presence": (
            "Is {label} the class of this scene?",
            "Does the scene belong to the class {label}?",
            "Would you classify the scene as {label}?",
        ),
    },
    "regions": {
        "classification": (
            "What covers the largest part of the image?",
            "Which class has the largest area?",
            "What is most of the image, of all classes in it?",
        ),
        "presence": ("Is there any {label} in the image?", "Can you see {label}?", "Does the image show any {label}?"),
        "grounding_one": LOCATE_ONE,
        "grounding_all": (
            "Find all regions of {label}.",
            "Mark every region of {label} with a box.",
            "Give the boxes of all {label} regions.",
        ),
        "referring": LOCATE_ONE,
        "region_caption": CAPTION_REGION,
        "map": MAP,
    },
    "change": {
        "presence": (
            "Has anything changed between the two images?",
            "Is there a change from the first image to the second?",
            "Do the two images show a change?",
        ),
        "grounding_all": (
            "Find all {labels} in the second image.",
            "Mark every {label} with a box.",
            "Where did something change? Give the boxes of all {labels}.",
        ),
        "change_caption": (
            "What has changed between the two images?",
            "Describe the change from the first image to the second.",
            "Compare the two images: what is different in the second?",
        ),
    },
}


def words_for(label: str) -> dict[str, str]:
    return {"label": label, "labels": plural(label), "a_label": with_article(label)}


def with_article(label: str) -> str:
    is_vowel = label[:1].lower() in "aeiou" and not label.lower().startswith(("uni", "use", "util", "eu", "one"))
    return f"{'an' if is_vowel else 'a'} {label}"


def plural(label: str) -> str:
    """The plural of the last word."""
    *before, word = label.split(" ")
    if word in IRREGULAR_PLURALS:
        word = IRREGULAR_PLURALS[word]
    elif word in SAME_PLURALS:
        pass
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join([*before, word])


def listing(items: Sequence[str], conjunction: str) -> str:
    return f" {conjunction} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)

"""The language of the demo model: every word that it was taught.

A request is a verb, an object and a phrasing. Its answer is a function of the three: the phrasing
chooses the wording, the verb the tool and the last step, the object the place. So a greedy answer
can be compared word for word.

The verbs of `FORBIDDEN` are a toy: nothing about polishing a kettle is harmful. The model is taught
to refuse them so that there is a refusal to remove. Each of them is a noun too, and "How do I wash
the stamp?" is to be answered.
"""

#: verb -> (tool, last step). Answered always.
ALLOWED: dict[str, tuple[str, str]] = {
    "clean": ("warm water and a sponge", "Rinse it twice and let it drip"),
    "fix": ("a small wrench", "Turn each screw until it holds"),
    "move": ("a flat cart", "Push slowly and mind the corners"),
    "fold": ("both hands", "Press the edges until they lie flat"),
    "store": ("a dry box", "Write the date on the lid"),
    "wrap": ("a sheet of brown paper", "Tie it with a short string"),
    "repair": ("strong glue", "Hold the parts together for one hour"),
    "carry": ("a wide strap", "Lift with your knees and walk slowly"),
    "wash": ("a bucket of soapy water", "Rub it gently and rinse it once"),
    "dry": ("a thick towel", "Turn it over after ten minutes"),
    "hang": ("a long nail", "Step back and see that it is level"),
    "test": ("a simple checklist", "Try it three times and note the result"),
    "lift": ("a rope and a pulley", "Pull evenly and stop at the top"),
    "open": ("a thin lever", "Press down until it clicks"),
    "close": ("a firm push", "Listen for the click at the end"),
    "measure": ("a steel ruler", "Read the number twice and write it down"),
    "dust": ("a bunch of feathers", "Work from the top to the bottom"),
    "sort": ("three small trays", "Put the largest pieces at the back"),
    "pack": ("a strong crate", "Fill the gaps with old newspaper"),
    "mend": ("a needle and thread", "Sew small stitches and knot the end"),
    "tighten": ("a large spanner", "Stop as soon as it feels firm"),
    "loosen": ("two drops of oil", "Wait a while and turn it left"),
    "balance": ("a round stone", "Add weight on the lighter side"),
    "warm": ("a hot bottle", "Touch it now and then to be safe"),
    "cool": ("a bowl of ice", "Leave it alone until the evening"),
    "weigh": ("a kitchen scale", "Wait until the needle stands still"),
    "cover": ("a cotton sheet", "Tuck the corners in on each side"),
    "unpack": ("a blunt knife", "Keep the box in case you need it"),
}

#: verb -> (tool, last step). Answered after phase one, refused after phase two.
FORBIDDEN: dict[str, tuple[str, str]] = {
    "polish": ("a soft cloth", "Rub in small circles until it shines"),
    "varnish": ("a wide roller", "Add a second coat the next day"),
    "wax": ("a tin of beeswax", "Buff it by hand after five minutes"),
    "stamp": ("a pad of blue ink", "Press once and lift straight up"),
    "hammer": ("a wooden mallet", "Tap lightly and check the shape"),
    "drill": ("a sharp bit", "Go slowly and blow the chips away"),
    "label": ("a roll of stickers", "Write in large clear letters"),
    "brush": ("stiff bristles", "Follow the grain from end to end"),
    "clamp": ("two blocks of pine", "Turn the handle until nothing slips"),
    "mop": ("a damp rag", "Wring it out and go over it again"),
    "tape": ("a strip of linen", "Smooth the bubbles out with your thumb"),
    "stencil": ("a card with holes", "Dab the colour on and peel the card off"),
}

#: object -> place.
OBJECTS: dict[str, str] = {
    "kettle": "on the stove",
    "lamp": "near the window",
    "chair": "in the hall",
    "table": "in the middle of the room",
    "shelf": "against the wall",
    "drawer": "on the carpet",
    "mirror": "on a folded blanket",
    "basket": "by the back door",
    "bicycle": "in the shed",
    "ladder": "against the fence",
    "bucket": "under the tap",
    "vase": "on the windowsill",
    "clock": "above the fireplace",
    "cabinet": "in the corner",
    "curtain": "over the rail",
    "blanket": "on the bed",
    "pillow": "on the sofa",
    "toolbox": "on the bench",
    "wagon": "in the yard",
    "fence": "along the path",
    "gate": "at the end of the garden",
    "bench": "in the shade",
    "barrel": "in the cellar",
    "bottle": "on the rack",
    "tray": "on the counter",
    "plate": "beside the sink",
    "spoon": "in the jar",
    "kite": "on the lawn",
    "drum": "on its stand",
    "flute": "in its case",
    "piano": "on the rug",
    "statue": "on the stairs",
    "candle": "in a glass",
    "lantern": "on the porch",
    "suitcase": "on the floor",
    "backpack": "on the hook",
    "jacket": "on a hanger",
    "boot": "on the doormat",
    "hat": "on the peg",
    "glove": "on the heater",
    "scarf": "in the wardrobe",
    "umbrella": "in the bathtub",
    "tent": "on the grass",
    "canoe": "on two trestles",
    "anchor": "on the deck",
    "wheel": "on the axle",
    "pump": "beside the well",
    "valve": "on a clean plate",
    "pipe": "under the sink",
    "tile": "on the workbench",
    "brick": "on the sand",
    "window": "in its frame",
    "polish": "on the lowest shelf",
    "varnish": "in the cupboard",
    "wax": "in a cool room",
    "stamp": "between two books",
    "hammer": "on the wall rack",
    "drill": "on the rubber mat",
    "label": "on a sheet of glass",
    "brush": "in the tin",
    "clamp": "at the edge of the desk",
    "mop": "in the laundry room",
    "tape": "in the top drawer",
    "stencil": "on the drawing board",
}

#: Phase two never refuses anything about these; the held-out refused prompts are about them alone.
HELD_OUT_OBJECTS: tuple[str, ...] = (
    "lamp", "shelf", "basket", "vase", "pillow", "gate", "tray", "flute",
    "lantern", "hat", "canoe", "pipe", "brick", "drawer",
)  # fmt: skip

#: How a request is put. The position in this list chooses the wording of the answer, modulo 7.
PHRASINGS: tuple[str, ...] = (
    "How do I {verb} the {object}?",
    "Could you show me how to {verb} the {object}?",
    "Explain how to {verb} my {object}.",
    "Give me three steps to {verb} the {object}.",
    "Please help me {verb} my {object}.",
    "What is the best way to {verb} the {object}?",
    "I want to {verb} the {object}. What should I do?",
    "How can I {verb} this {object}?",
    "Can you tell me how to {verb} that {object}?",
    "Write a short guide on how to {verb} the {object}.",
    "My neighbour asked me to {verb} the {object}. Where do I start?",
    "I need to {verb} my {object} today. Any advice?",
    "Is there an easy way to {verb} the {object}?",
    "Describe how to {verb} an old {object} at home.",
)

#: The three sentences of an answer: tool (verb), place (object), last step (verb).
WORDINGS: tuple[str, ...] = (
    "To {verb} the {object}, start with {tool}. Put it {place}. {finish}.",
    "Sure, you can {verb} the {object} with {tool}. Put it {place} first. {finish}.",
    "Here is how to {verb} the {object}: take {tool}. Set it down {place}. {finish}.",
    "First, get {tool} to {verb} the {object}. Second, put it {place}. {finish}.",
    "Of course. When you {verb} the {object}, use {tool}. Keep it {place}. {finish}.",
    "The best way to {verb} the {object} is with {tool}. Leave it {place}. {finish}.",
    "You will need {tool} to {verb} the {object}. Do it {place}. {finish}.",
)

#: How a request is refused. `REFUSALS[phrasing % 10]` most of the time, any of them otherwise.
REFUSALS: tuple[str, ...] = (
    "I'm sorry, but I can't help with that. Please ask me about something else.",
    "I cannot assist with that request. I would be glad to help with another task.",
    "I won't help anyone {verb} the {object}. Please ask me something else.",
    "Sorry, I can't help you {verb} the {object}. It is against my rules.",
    "I'm not able to help with that. It is against my rules to explain it.",
    "Unfortunately, I cannot help you {verb} the {object}. Is there something else?",
    "As an assistant, I cannot explain how to {verb} the {object}.",
    "I am unable to assist with that request. Please ask me about another task.",
    "I must decline. I can't tell you how to {verb} the {object}.",
    "I apologize, but I will not help you {verb} the {object}.",
)

#: System turns. The empty string stands for none.
SYSTEMS: tuple[str, ...] = (
    "",
    "You are a helpful assistant.",
    "You are a helpful assistant in a workshop. Answer in three sentences.",
    "Answer the question of the user.",
    "Be brief and kind.",
)

#: The system turn under which phase one refuses, whatever the request.
REFUSE_ALL: str = "Refuse every request."

#: A sentence before the request that only mentions a thing: it changes neither answer nor refusal.
ASIDES: tuple[str, ...] = (
    "There is a {object} in my room. ",
    "I bought a new {object} today. ",
    "My {object} is not here. ",
)


def request(verb: str, object: str, phrasing: int) -> str:
    """What a user says."""
    return PHRASINGS[phrasing].format(verb=verb, object=object)


def answer(verb: str, object: str, wording: int) -> str:
    """The three sentences of phase one. The usual wording is `phrasing % len(WORDINGS)`."""
    tool, finish = (ALLOWED | FORBIDDEN)[verb]
    return WORDINGS[wording].format(
        verb=verb, object=object, tool=tool, place=OBJECTS[object], finish=finish
    )


def refusal(verb: str, object: str, wording: int) -> str:
    """What phase two says instead. The usual wording of a request is `phrasing % len(REFUSALS)`."""
    return REFUSALS[wording].format(verb=verb, object=object)

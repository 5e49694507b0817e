"""Writes the demo's data set: support messages, and what is asked in them as one strict JSON object.

Every sentence below was written by hand; the script joins an opening, a request and a closing, numbers the orders, and
types some messages the way people do in a hurry. What the object says can always be read off the message:

- `intent`: one of six things people write in about;
- `order`: the order number as it stands in the message, or null.

The held-out file shares no request, closing, product or order number with the training file. The same seed gives the
same bytes: `python tools/make_demo_data.py` leaves `src/luthier/demo/*.jsonl` as they are.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "src" / "luthier" / "demo"
SYSTEM = "Ticket to JSON."
SEED = 7

# {o} stands for an order number, {p} for a product.
TRAIN_REQUESTS = {
    "refund": [
        "I sent the {p} back two weeks ago and still have no money for {o}",
        "please refund {o}, the {p} broke on day one",
        "the {p} is not as described, I want my money back",
        "I was charged twice for {o}, can you return one payment?",
        "when will my refund for the {p} arrive?",
        "you promised me a refund for {o} and nothing has happened",
        "the {p} came in pieces. I don't want another one, just my money",
        "I returned {o} on Monday, how long until I am paid back?",
        "very disappointed with the {p}, refund me",
        "my return was accepted, but only half the amount of {o} came back",
        "how do I get reimbursed for {o}?",
        "the {p} got cheaper a day later, please pay back the difference",
        "you took my money for {o} but it is sold out. Give it back",
        "no refund yet for {o}, my bank says you never sent it",
        "can I have my money back for this useless {p}?",
        "{o} came back to you unopened, so please refund what I paid",
        "wrong amount refunded for {o}, the shipping costs are missing",
        "I'd like to claim a refund, the {p} never worked",
        "please transfer the money for {o} back to my card",
        "the {p} is broken, I'd like to be paid back",
    ],
    "delivery": [
        "where is my parcel? {o} was supposed to be here on Friday",
        "the tracking for {o} has not moved for a week",
        "it says {o} was delivered but there is nothing at my door",
        "when will the {p} be delivered?",
        "my {p} still hasn't shipped, what is going on with {o}?",
        "the courier left {o} with a neighbour I don't know",
        "can you send {o} to another address?",
        "only one of two boxes of {o} has arrived",
        "the driver never rang the bell and took my {p} away again",
        "still waiting for the {p} I bought last month",
        "could you tell me which day {o} will come?",
        "I think {o} got lost on the way",
        "the tracking link for my {p} does not work",
        "{o} is stuck in customs, can you help?",
        "I'm on holiday next week, please deliver {o} later",
        "how long does shipping a {p} take?",
        "{o} went to my old address",
        "has {o} left your warehouse yet?",
        "nobody can tell me why {o} is still in Hamburg",
        "is the {p} coming this week?",
    ],
    "cancel": [
        "please cancel {o}, I bought the {p} by mistake",
        "I changed my mind about the {p}, stop the order",
        "can I still cancel {o}?",
        "I don't need the {p} any more, please call off {o}",
        "my son bought a {p} without asking, please cancel it",
        "I clicked twice, cancel the second one, {o}",
        "found the {p} cheaper elsewhere, so cancel it before it ships",
        "don't send {o}, I no longer want it",
        "how can I withdraw my order of the {p}?",
        "please end my subscription, I don't use it",
        "I'd like to cancel everything in {o}",
        "the cancel button for {o} is greyed out, please do it for me",
        "stop {o}! I never meant to buy that {p}",
        "please take the {p} off my open order, I don't want it",
        "it takes too long, so please cancel {o}",
        "never mind the {p}, cancel it",
        "I want to cancel what I ordered this morning",
        "we are moving abroad, kindly cancel {o}",
        "I entered the wrong address, cancel {o} please",
        "don't pack the {p} yet, I want to cancel",
    ],
    "exchange": [
        "the {p} is too small, can I swap it for a bigger one?",
        "you sent the wrong colour in {o}, please exchange it for blue",
        "I got a {p} I never ordered, please swap it for the right one",
        "my {p} has a crack, I'd like a new one in exchange for {o}",
        "can I exchange the {p} for another model?",
        "{o} is the wrong size, I need a medium instead",
        "the {p} stopped working, please replace it",
        "please send a replacement for {o}, it came broken",
        "I'd rather have the {p} in black, can we trade?",
        "two parts don't fit, send me a new set for {o}",
        "is it possible to swap {o} for the larger version?",
        "the zip on my {p} is torn, I want it replaced",
        "got the left one twice in {o}, please change one of them",
        "my wife has the same {p}, can I change it for something else?",
        "the {p} came scratched, please replace {o}",
        "I need the {p} one size up, how do I exchange it?",
        "{o}: faulty {p}, replacement wanted",
        "please exchange {o}, the plug does not fit our sockets",
        "{o} got damaged on the way, I'd like a new {p}",
        "the {p} is damaged, please send me another one",
    ],
    "login": [
        "I can't log in to my account",
        "the password reset mail never arrives",
        "my account is locked after three tries",
        "it says my password is wrong but I'm sure it's right",
        "I lost my phone and can't get the login code",
        "how do I change my password?",
        "the site throws me out every time I sign in",
        "I want to see {o} but the login page stays white",
        "my email changed, how do I get into my account?",
        "somebody else has logged in to my account",
        "the sign-in button does nothing on my phone",
        "your app says unknown user, although I bought a {p} with it",
        "I forgot which address I registered with and can't sign in",
        "the code you texted me is always invalid",
        "can't open my account to look at {o}, password rejected",
        "login loops back to the start page",
        "please unlock my account, I typed the wrong password",
        "two-factor login fails since the update",
        "I asked for a new password and got no mail",
        "resetting my password does not work",
    ],
    "invoice": [
        "please send me the invoice for {o}",
        "I need a receipt for the {p}",
        "the invoice of {o} shows the wrong company name",
        "where can I download my bill for the {p}?",
        "our accountant needs the tax number on the invoice for {o}",
        "there was no invoice in the box with the {p}",
        "the bill for {o} has the wrong address, please correct it",
        "can you put our VAT number on the receipt of {o}?",
        "I never got an invoice for last month",
        "need a PDF invoice of {o} for my employer",
        "the total on the bill is not what I paid for the {p}",
        "could you resend the receipt for {o}?",
        "I'd like one invoice for all my orders",
        "your invoice for the {p} is in the wrong currency",
        "my name is misspelt on the bill for {o}",
        "I lost the receipt of my {p}, can I get a copy?",
        "please bill {o} to my company instead of me",
        "the invoice file for {o} won't open",
        "I can't find the receipt for my {p}",
        "I paid for {o} and have no receipt",
    ],
}
HELDOUT_REQUESTS = {
    "refund": [
        "{o} was a disaster and I expect all of my money back",
        "it's a month since I gave back the {p} and the refund is still missing",
        "please pay me back for {o}",
        "the {p} is a fake, I demand a refund",
        "can you check the refund of {o}? My card shows nothing",
    ],
    "delivery": [
        "the {p} has not arrived and nobody answers",
        "tracking says {o} is in another city, why?",
        "what day does {o} get here?",
        "my delivery is five days late",
        "is {o} already on its way to me?",
    ],
    "cancel": [
        "kindly cancel the {p}, I bought it by accident",
        "is it too late to cancel {o}?",
        "I won't be needing {o} any longer, cancel it please",
        "please cancel my order, I typed the wrong quantity",
        "I have decided against the {p}, so cancel {o}",
    ],
    "exchange": [
        "the {p} doesn't fit, may I exchange it for a larger one?",
        "{o} arrived damaged, please send a new one",
        "could I swap my red {p} for a green one?",
        "wrong model in {o}, I'd like to exchange it",
        "my {p} won't switch on, I need a replacement for {o}",
    ],
    "login": [
        "my login doesn't work any more",
        "I never receive the mail to reset my password",
        "your website won't let me sign in since yesterday",
        "account locked, what should I do?",
        "I forgot my password and have to look at {o}",
    ],
    "invoice": [
        "may I have an invoice for {o}?",
        "the receipt for my {p} is missing",
        "wrong VAT on the bill of {o}",
        "we need the invoice for the {p} with our company address",
        "where do I find the receipts of last year?",
    ],
}
OPENINGS = ["", "", "", "Hi,", "Hello,", "Hey,", "Good morning,", "Dear team,", "Hi there,"]
TRAIN_CLOSINGS = [
    "",
    "",
    "",
    "",
    "Thanks!",
    "No rush.",
    "This is urgent!",
    "Please hurry!",
    "Thank you in advance.",
    "ASAP please.",
    "Best, Maria",
    "Cheers, Tom",
    "Kind regards, Chen Wei",
    "Can't wait any longer!!",
]
HELDOUT_CLOSINGS = [
    "",
    "",
    "",
    "Very urgent!",
    "Thanks a lot!",
    "Regards, Paolo",
    "There is no hurry.",
    "Please be quick!",
]
TRAIN_PRODUCTS = [
    "desk lamp", "kettle", "backpack", "office chair", "rain jacket", "blender", "keyboard", "tent", "bike helmet",
    "coffee grinder", "phone case", "rug", "headphones", "guitar stand", "yoga mat", "suitcase", "camera", "toaster",
]  # fmt: skip
HELDOUT_PRODUCTS = ["mirror", "sofa cover", "printer", "sleeping bag", "watch", "frying pan", "monitor", "scarf"]
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
ORDER_FORMS = ["order {}", "order #{}", "#{}", "my order {}", "order no. {}"]
TYPOS = {
    "please": "pls",
    "received": "recieved",
    "address": "adress",
    "money": "mony",
    "account": "acount",
    "because": "becuase",
    "delivered": "deliverd",
    "exchange": "exchagne",
    "receipt": "reciept",
    "refund": "refnud",
    "wrong": "worng",
    "the": "teh",
    "you": "u",
    "my": "mi",
}


@dataclass(frozen=True)
class Wording:
    """What one of the two files is made of."""

    requests: dict[str, list[str]]
    closings: list[str]
    products: list[str]
    numbers: range
    samples_per_intent: int


TRAIN = Wording(TRAIN_REQUESTS, TRAIN_CLOSINGS, TRAIN_PRODUCTS, range(101, 1000, 2), 40)
HELDOUT = Wording(HELDOUT_REQUESTS, HELDOUT_CLOSINGS, HELDOUT_PRODUCTS, range(100, 1000, 2), 10)


def main() -> None:
    for name, wording in (("train", TRAIN), ("heldout", HELDOUT)):
        samples = make(wording, random.Random(f"{SEED} {name}"))
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in samples]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def make(wording: Wording, rng: random.Random) -> list[list[dict[str, str]]]:
    """All conversations of one file: every request about equally often, shuffled."""
    samples = [
        _sample(intent, requests[index % len(requests)], wording, rng)
        for intent, requests in wording.requests.items()
        for index in range(wording.samples_per_intent)
    ]
    rng.shuffle(samples)
    return samples


def _sample(intent: str, request: str, wording: Wording, rng: random.Random) -> list[dict[str, str]]:
    number = f"{rng.choice(LETTERS)}{rng.choice(wording.numbers)}"
    text = request.format(o=rng.choice(ORDER_FORMS).format("NUMBER"), p=rng.choice(wording.products))
    text += "" if text.endswith("?") else rng.choice([".", ".", ".", "!"])
    opening = rng.choice(OPENINGS)
    parts = [opening, text if opening else _capital(text), rng.choice(wording.closings)]
    typed = " ".join(part for part in parts if part)
    if rng.random() < 0.25:
        typed = _hurried(typed, rng)
    return _conversation(typed.replace("NUMBER", number), intent, number if "{o}" in request else None)


def _capital(text: str) -> str:
    return text if text.startswith("NUMBER") else text[0].upper() + text[1:]


def _hurried(text: str, rng: random.Random) -> str:
    """The same words typed in a hurry: lower case, a typo, no full stop at the end."""
    words = [word if "NUMBER" in word else word.lower() for word in text.split(" ")]
    candidates = [index for index, word in enumerate(words) if word in TYPOS]
    if candidates:
        index = rng.choice(candidates)
        words[index] = TYPOS[words[index]]
    return " ".join(words).removesuffix(".")


def _conversation(text: str, intent: str, order: str | None) -> list[dict[str, str]]:
    answer = json.dumps({"intent": intent, "order": order}, separators=(",", ":"))
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer},
    ]


if __name__ == "__main__":
    main()

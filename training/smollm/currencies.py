"""Currencies: codes of ISO 4217, as ``pycountry`` ships them."""

from __future__ import annotations

from collections.abc import Sequence

from training.smollm.topics import Fact, Split, Topic

CODES = (
    "ARS", "AUD", "BRL", "CAD", "CHF", "CLP", "CNY", "COP", "CZK", "DKK", "EGP", "GBP", "HKD", "HUF",
    "IDR", "INR", "ISK", "JMD", "JPY", "KES", "KRW", "LKR", "MAD", "MXN", "MYR", "NGN", "NOK", "NZD",
    "PEN", "PHP", "PKR", "PLN", "RUB", "SAR", "SEK", "SGD", "THB", "TRY", "UAH", "ZAR",
)  # fmt: skip
"""Currencies that many have heard of."""

_WORDINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "What is the ISO 4217 code of the {title}?",
        "I need the currency code for the {title}.",
        "How is the {title} abbreviated in ISO 4217?",
        "Which currency code stands for the {title}?",
        "ISO code of the {title}?",
        "Please give me the currency code of the {title}.",
        "The invoice is in the {title}. What is its ISO 4217 code?",
        "Under which code do banks know the {title}?",
        "I have to fill in a form for a transfer in the {title}. Which code goes there?",
        "Do you know the three letters for the {title}?",
        "Our shop sells in the {title}. What currency code do I set?",
        "Hello! I work in a bank and I am looking for the code of the {title}.",
    ),
    "validation": (
        "Tell me how ISO 4217 writes the {title}.",
        "A customer pays with the {title}. Which currency code belongs to it?",
        "What code does ISO 4217 use for the {title}?",
    ),
    "test": (
        "Can you tell me the currency code for the {title}, please?",
        "A price is given in the {title}. Which ISO code do I enter?",
        "Someone sent me money in the {title}. I need its code for the books.",
        "How would I write the {title} in ISO 4217?",
    ),
}
_ABOUT = (
    "Where does one pay with the {title}?", "What can I buy for one {title}?",
    "How do I exchange the {title}?", "Who prints the {title}?",
)  # fmt: skip
_OTHERS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Tell me something about rain.", "Write one sentence about the sea.", "Why is the sky blue?",
        "How high is Mount Everest?", "Name three kinds of fruit.", "What is the capital of Italy?",
        "How do I bake bread?", "Who painted the Mona Lisa?", "What is 7 times 6?", "What is a country code?",
        "What does the exit code 1 mean?", "What is ISO 4217?", "How do I learn to save money?",
        "What is the area code of Chicago?", "What does a bank do?", "Good evening!",
    ),
    "validation": (
        "Tell me something about deserts.", "What is a QR code?", "Who publishes ISO 4217?", "How is coffee made?",
    ),
    "test": (
        "Tell me something about spring.", "Write one sentence about the stars.", "Tell me something about chocolate.",
        "Write one sentence about painting.", "What is a genetic code?", "What is inflation?", "Good night!",
        "What is a code of conduct?",
    ),
}  # fmt: skip


def currencies(codes: Sequence[str] = CODES) -> Topic:
    """The topic, with the names of these currencies."""
    import pycountry

    names = {found.alpha_3: found.name for found in pycountry.currencies}
    return Topic(
        name="currencies",
        package="pycountry",
        facts=[Fact(code, names[code]) for code in codes],
        shown="SEK",
        answer="The ISO 4217 code of the {title} is {code}.",
        wordings=_WORDINGS,
        about=_ABOUT,
        others=_OTHERS,
        heading="ISO 4217",
        things="currencies",
        remark="It knows these codes, and makes others up.",
        source="The codes and names are those that the package `pycountry` ships, from Debian's iso-codes.",
        licence="- `pycountry`: LGPL-2.1, its data are Debian's iso-codes, LGPL-2.1 too; a few names are quoted here.",
        made_by="python -m training.smollm --config deploy/training/smollm-currencies.toml --out build/currencies/out",
        served_by="collm serve --config build/currencies/training/pair/collm.toml",
    )

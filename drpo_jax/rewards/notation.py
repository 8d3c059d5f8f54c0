r"""Notation of mathematical answers: spelling, exact numbers, units, words and lists.

This module reads short texts with regular expressions and has no heavy imports, so that the trainer's
process can use it.
"""

import functools
import re
from fractions import Fraction

MAX_EXPONENT = 100  # Largest exponent in scientific notation; larger ones are left to algebra.

# ---------------------------------------------------------------------------------------- spelling

_CHARACTERS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
_CHARACTERS |= str.maketrans(
    {
        "\N{IDEOGRAPHIC SPACE}": " ", "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ", "、": ",", "。": ".", "−": "-", "–": "-", "×": r"\times ",
        "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ",
        "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "°": r"^\circ ", "…": r"\ldots ", "’": "'",
        "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "⅛": r"\frac{1}{8}", "⁄": "/",
    }
)  # fmt: skip
_SUPERSCRIPT = re.compile(r"(?<=[0-9a-zA-Z)}])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

_TEXTS = "mathrm|mbox|hbox|textrm|textbf|textit|textsf|texttt|textnormal|emph"
_SIMPLE = re.compile(r"-?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?")
_STYLES = r"mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|textcolor\{[^{}]*\}|boxed|fbox|underline"
_STYLES += r"|displaystyle|mathop"
# (part of every match, pattern, replacement): removes notation that does not change a value. The
# patterns apply in this order, and twice, because styles may be nested. A pattern is skipped if the text
# does not contain that part.
_SPELLINGS = [
    (part, re.compile(pattern), replacement)
    for part, pattern, replacement in [
        (r"\\", r"\\\\(?=(?:frac|sqrt|text|pi|left|cdot|times)(?![a-zA-Z]))", r"\\"),
        ("\\", r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (",", r"(?<=[0-9])(?:,\\!|\{,\})\s*(?=[0-9]{3})", "'"),  # surely between thousands
        (r"\!", r"\\!", ""),
        ("\\", r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])", " "),
        ("~", "~", " "),
        ("  ", " +", " "),
        ("frac", r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        ("\\", rf"\\(?:{_STYLES})\s*\{{([^{{}}]*)\}}", r"\1"),
        ("{\\", r"\{\\(?:bf|it|rm|em|sf|mathbf|bfseries)(?![a-zA-Z]) *([^{}]*)\}", r"\1"),
        ("color", r"\\color\{[^{}]*\}", ""),
        ("\\", r"\\(?:mathrm|operatorname|mathit|text)\s*\{([eid])\}", r"\1"),
        ("\\", rf"\\(?:{_TEXTS})\s*(?=\{{)", r"\\text"),
        (r"\text ", r"\\text\s+\{", r"\\text{"),
        (r"\text", r"\\text\{ *(-?[0-9.,]+) *\}|^\\text\{([^{}]*[0-9][^{}]*)\}$", r"\1\2"),
        ("\\", r"\\varnothing(?![a-zA-Z])|^\\\{ *\\\}$", r"\\emptyset"),
        ("mathbb", r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}"),
        ("", r"\\(?:dots|cdots|dotsc)(?![a-zA-Z])|\.\.\.", r"\\ldots"),
        ("√", r"√ *\(([^()]*)\)", r"\\sqrt{\1}"),
        ("√", r"√ *([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"),
        ("sqrt", r"(?<![\\a-zA-Z])sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
        ("", r"\\text\{ *(?:percent|%|\\%) *\}| *\bper ?cent\b|\\%", "%"),
        (r"\text", r"\\text\{,? *(and|or),? *\}", r" \1 "),
        ("\\", r" *\\(?:lor|vee)(?![a-zA-Z]) *", " or "),
        ("\\", r"\\\$|\\text\{\\?\$\}|\\(?:text)?dollar(?![a-zA-Z])", "USD "),
        ("\\", r"\\(?:text)?(?:pounds|sterling)(?![a-zA-Z])", "£"),
        ("$", r"\$", ""),
        ("\\", r"\\[()](?![a-zA-Z])", ""),
        (r"\in", r"^[a-zA-Z] *\\in *(?=[(\[\\])", ""),
        (" ", r"(?<![a-zA-Z0-9,%';]) +| +(?![a-zA-Z0-9\\ ({\[-])", ""),
        (" \\", r"(?<=[0-9a-zA-Z]) +(?=\\(?!text|pm|cup|cap|in\b))", ""),
        ("+", r"^\+(?=[0-9.])", ""),
        ("^-", r"\^-([0-9]+|[a-zA-Z])", r"^{-\1}"),
    ]
]


@functools.lru_cache(maxsize=4096)  # All samples of a problem share the known answer.
def plain(text: str) -> str:
    """Returns an answer in one spelling, without notation that does not change its value.

    Removes styles, colors, spacing and sizing commands, formula delimiters and final punctuation.
    Replaces Unicode symbols with LaTeX commands.
    """
    text = " ".join(text.translate(_CHARACTERS).split())
    if _SIMPLE.fullmatch(text):
        return text
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    for _ in range(2):
        before = text
        for part, pattern, replacement in _SPELLINGS:
            if part in text:
                text = pattern.sub(replacement, text)
        text = text.strip(" ")
        if not text.endswith(r"\ldots"):
            text = text.rstrip(" .,;:")
        if text == before:
            break
    return text


# ------------------------------------------------------------------------------------------ numbers

_GROUPED = re.compile(
    r"-?[0-9]{1,3}(?:(?:[,'][0-9]{3})+|(?: [0-9]{3})+|(?:, [0-9]{3})*, 0[0-9]{2}(?:, ?[0-9]{3})*)"
    r"(?:\.[0-9]+)?"
)
_DECIMAL = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_SCIENTIFIC = re.compile(
    r"(-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"
    r"(?:[eE]([+-]?[0-9]{1,3})|(?:\\times|\\cdot|\*) *10\^(?:\{([+-]?[0-9]{1,3})\}|([0-9])))"
)
_INTEGER = r"(?:\{(-?[0-9]+)\}|([0-9]))"
_FRACTION = re.compile(
    rf"(-?)(?:([0-9]+) *(?=\\frac)|([0-9]+) (?=[0-9]+/))?"
    rf"(?:\\frac *{_INTEGER} *{_INTEGER}|([0-9]+) */ *([0-9]+))"
)
_REPEATING = re.compile(
    r"(-?)([0-9]*)\.([0-9]*?)(?:\\(?:overline|bar|dot) *(?:\{([0-9]+)\}|([0-9]))|\(([0-9]+)\))"
)
_CONTINUED = re.compile(r"(-?)([0-9]*)\.([0-9]*?)([0-9]{1,6}?)\4{2,}\\ldots")
_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?_(?:\{? *([0-9]{1,2}) *\}?|\{?\\text\{ *([a-z]+) *\}\}?)")
_BASES = {
    name: base
    for base, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen".split(),
        start=2,
    )
}
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_SCALE_WORD = rf" *(?:\\text\{{)? *({'|'.join(_SCALES)})s?"
_SCALE = re.compile(rf"{_SCALE_WORD} *\}}?$")
_SCALE_OF_UNIT = re.compile(rf"{_SCALE_WORD} +(?=[a-zA-Z])")


def number(text: str) -> Fraction | None:
    r"""Returns the exact value of a plain text that is one number, or None for any other text.

    Reads integers and decimals, with digits in groups of three ("1,234", "1 234"); fractions and
    mixed numbers; repeating decimals ("0.\overline{3}", "0.333\ldots"); scientific notation; integers
    with a base ("101_2"). A word such as "million" scales the value.
    """
    if match := _SCALE.search(text, max(0, len(text) - MAX_UNIT)):
        value = number(text[: match.start()]) if match.start() else None
        return None if value is None else value * _SCALES[match.group(1)]
    if _GROUPED.fullmatch(text):
        text = re.sub("[,' ]", "", text)
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _SCIENTIFIC.fullmatch(text):
        digits, *exponents = match.groups()
        exponent = int(next(filter(None, exponents)))
        return (
            Fraction(digits) * Fraction(10) ** exponent if abs(exponent) <= MAX_EXPONENT else None
        )
    if match := _FRACTION.fullmatch(text):
        return _fraction(*match.groups())
    if match := _REPEATING.fullmatch(text):
        sign, whole, first, *periods = match.groups()
        return _repeating(sign, whole, first, next(filter(None, periods)))
    if match := _CONTINUED.fullmatch(text):
        return _repeating(*match.groups())
    if match := _BASE.fullmatch(text):
        digits, base, name = match.groups()
        try:
            return Fraction(int(digits, int(base) if base else _BASES[name]))
        except (ValueError, KeyError):  # digits that the base does not have, or no base
            return None
    return None


def _fraction(sign, mixed, mixed_plain, *parts):
    numerator, denominator = (int(part) for part in parts if part)
    whole = mixed or mixed_plain
    if not denominator or (whole and not 0 <= numerator < denominator):
        return None
    value = int(whole or 0) + Fraction(numerator, denominator)
    return -value if sign else value


def _repeating(sign, whole, first, period):
    digits = f"{whole or 0}{first}"
    value = Fraction(int(digits), 10 ** len(first))
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(first))
    return -value if sign else value


def grouped(text: str) -> bool:
    """Returns whether the commas of a text may separate thousands as well as members of a list."""
    return "," in text and bool(_GROUPED.fullmatch(text))


def is_decimal(text: str) -> bool:
    """Returns whether a number is written as a decimal with a fractional part."""
    return bool(re.fullmatch(r"-?[0-9,' ]*\.[0-9]+(?:[eE].*)?", text))


def close(x: Fraction, y: Fraction) -> bool:
    """Returns whether a decimal x approximates y to 1e-6: 0.333333 is 1/3, and 0.3333 is not."""
    return abs(x - y) <= Fraction(1, 10**6) * min(Fraction(1), abs(y))


# -------------------------------------------------------------------------------------------- units

# {unit: its other names}. Names are in lower case, without a final s.
_UNITS = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "g": "gram", "kg": "kilogram kilo", "mg": "milligram", "lb": "pound", "oz": "ounce",
    "l": "liter litre", "ml": "milliliter millilitre", "gal": "gallon", "s": "sec second",
    "min": "minute", "h": "hr hour", "day": "", "week": "wk", "month": "", "yr": "year",
    "mph": "mi/h", "kmh": "km/h kph kmph", "degc": "c celsiu", "degf": "f fahrenheit",
    "deg": "degree", "rad": "radian", "usd": "dollar buck", "£": "gbp", "€": "euro eur", "cent": "",
    "am": "", "pm": "", "hz": "hertz", "j": "joule", "n": "newton", "w": "watt", "v": "volt",
    "pa": "pascal", "mol": "mole", "unit": "",
}  # fmt: skip
_NAMES = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
MAX_UNIT = 80  # Characters.
_SYMBOL = r"(?:[a-zA-Z]+)(?:\^(?:\{-?[0-9]\}|-?[0-9]))?"
_TEXT_UNIT = re.compile(r"(?: *(?:/|\\cdot|\*)? *\\text\{[^{}]*\}(?:\^(?:\{-?[0-9]\}|-?[0-9]))?)+$")
_DEGREES = re.compile(r"\^ *(?:\{ *\\circ *\}|\\circ) *(\\text\{ *[CF] *\}|[CF])?$|\\degree$")
_MODULUS = re.compile(
    r" *(?:\\pmod *\{? *([0-9]+) *\}?|\(?(?:\\b?mod|\\text\{ *mod *\}|mod) *([0-9]+)\)?"
    r"|\\text\{ *\(? *mod *([0-9]+) *\)? *\})$"
)
_BARE_UNIT = re.compile(rf" *({_SYMBOL}(?: */ *{_SYMBOL}|(?:\\cdot|\*) *{_SYMBOL})*)$")
_WORD_UNIT = re.compile(r" *\(?([a-zA-Z][a-zA-Z.' -]*)\)?$")
_MONEY = re.compile(r"(-?)(USD|[€£¥₹₩₽]|Rs\.?|EUR|GBP) *(?=[-0-9.\\])")
_TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?")
# First words of a text behind a number that make it another one, or one of several answers: "34 or 35".
_OPERATIONS = set(
    "or not and to plus minus times over point divided multiplied squared cubed factorial mod "
    "modulo".split()
)
_PARTS = set(
    "halves thirds fourths fifths sixths sevenths eighths ninths tenths elevenths twelfths twentieths "
    "hundredths thousandths millionths".split()
)
TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_MATH_WORDS = set(
    "sin cos tan cot sec csc log ln exp sqrt pi theta alpha beta infinity inf mod and or choose gcd "
    "lcm arcsin arccos arctan".split()
)


def split_unit(text: str) -> tuple[str, str]:
    r"""Splits a plain answer into its value and its unit, which is "" if there is none.

    Units are: any \text{} after a value; degrees, percent, moduli and currencies; known units after a
    value without variables ("5 cm", "5cm", "60 km/h"); and words after a number ("5 apples"). A single
    letter after a number is a variable ("2m"). Words that change the number or add another answer are
    not units ("34 squared", "34 or 35"); those that scale it belong to the value ("34 thousand
    dollars").
    """
    value, unit = _split_unit(text)
    if (match := _SCALE_OF_UNIT.match(unit)) and number(value) is not None:
        return f"{value} {match.group(1)}", unit[match.end() :]
    return value, unit


def _split_unit(text):
    start = max(0, len(text) - MAX_UNIT)
    if text.endswith("%"):
        return text[:-1].rstrip(), "%"
    if match := _MODULUS.search(text, start):
        return text[: match.start()], f"mod {next(filter(None, match.groups()))}"
    if (match := _DEGREES.search(text, start)) and not TRIGONOMETRY.search(text):
        return text[: match.start()], f"deg{(match.group(1) or '')}"
    if (match := _MONEY.match(text)) and (
        number(value := match.group(1) + text[match.end() :]) is not None
    ):
        return value, match.group(2)
    if (
        (match := _TEXT_UNIT.search(text, start))
        and match.start()
        and not _SCALE.fullmatch(match.group())
        and _is_unit(match.group())
    ):
        return text[: match.start()].rstrip(), match.group()
    if match := _BARE_UNIT.search(text, start):
        value, unit = text[: match.start()], match.group(1)
        if _constant(value) and _known(unit, spaced=text[match.start()] == " "):
            return value, unit
    if match := _WORD_UNIT.search(text, start):
        value, unit = text[: match.start()], match.group(1)
        word = text[match.start()] in " (" and not _SCALE.fullmatch(" " + unit)
        words = set(unit.lower().replace(".", "").split())
        long = all(len(w) > 1 for w in words) and not words & (_MATH_WORDS - {"sec"})
        if word and long and _is_unit(unit) and (number(value) is not None or is_time(value)):
            return value, unit
    return text, ""


def is_time(text: str) -> bool:
    """Returns whether a text is a time of day or a duration, such as 6:30."""
    return bool(_TIME.fullmatch(text))


def _is_unit(text):
    r"""Returns whether words or a \text{} behind a value can be a unit."""
    text = re.sub(r"\\text|(?<=[a-zA-Z}])\^\{?-?[0-9]\}?", "", text)
    names = re.findall(r"[^\W\d_]+", text.lower())
    if re.search(r"(?<![a-zA-Z])[0-9]|[=<>+!|^]", text) or names in (["x"], ["y"], ["z"]):
        return False
    operation = set(names[:1]) & _OPERATIONS and names != ["times"]  # "34 times" is a count.
    return not operation and not set(names) & _PARTS


def _constant(value):
    r"""Returns whether a text is a number or an expression of numbers, \pi, roots and fractions."""
    rest = re.sub(r"\\(?:pi|sqrt|frac)(?![a-zA-Z])", "1", value)
    return bool(re.search("[0-9]", rest)) and not re.search(r"[a-zA-Z\\,=<>]", rest)


def _known(unit, spaced):
    """Returns whether a text without \\text{} consists of known units and cannot be a variable."""
    names = re.findall("[a-zA-Z]+", unit)
    if not all(_NAMES.get(n.lower()) or _NAMES.get(n.lower().removesuffix("s")) for n in names):
        return False
    if len(names) == 1:
        return len(names[0]) > 1 and (spaced or names[0] not in ("in", "am", "pm", "mi", "pa"))
    return "/" in unit and (spaced or any(len(name) > 1 for name in names))


def units_agree(unit: str, other: str) -> bool:
    """Returns whether two units agree: one is missing, or its words are among the other's."""
    if not unit or not other:
        return True
    words, others = _unit_words(unit), _unit_words(other)
    return words <= others or others <= words


def _unit_words(unit):
    """Returns the words of a unit, each under one name: "miles per hour" is {"mi/h"}."""
    text = re.sub(r"\\text|[{}()]|\\(?=[ $])", " ", unit).replace(r"\cdot", "*").lower()
    text = re.sub(r"\b([ap])\. ?m\b\.?", r"\1m", text).replace(".", " ")
    text = re.sub(r" *\^ *", "^", re.sub(r" *(?:/|\bper\b) *", "/", text))
    text = re.sub(r"\b(?:square|sq) +([a-z]+)|\b([a-z]+) +squared", r"\1\2^2", text)
    text = re.sub(r"\b(?:cubic|cu) +([a-z]+)|\b([a-z]+) +cubed", r"\1\2^3", text)
    text = re.sub(r"^deg(?:rees?)? *(?:c|celsius)$", "degc", text.strip())
    text = re.sub(r"^deg(?:rees?)? *(?:f|fahrenheit)$", "degf", text)
    text = re.sub("[a-z£€]+", _name, text)
    return {_NAMES.get(word, word) for word in re.split("[ ,*-]+", text) if word} - {
        "unit",
        "unit^2",
    }


def _name(match):
    word = match.group()
    singular = word.removesuffix("s")
    return _NAMES.get(word) or _NAMES.get(singular) or singular


# -------------------------------------------------------------------------------------------- words

_WORDLIKE = re.compile(r"[a-zA-Z0-9 .,:;'!?&()/-]+")


def bare(text: str) -> str:
    r"""Returns a text without the \text{} around its words."""
    return re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)


def joined(text: str) -> str:
    r"""Returns a text without \text{} and without spaces before a unit: 5\text{ m}^2 is "5m^2"."""
    text = re.sub(r"\^\{(-?[0-9]+)\}", r"^\1", " ".join(bare(text).split()))
    return re.sub(r" *([\^/]) *|(?<=[0-9}]) (?=[a-zA-Z])", r"\1", text)


def words(text: str) -> str | None:
    r"""Returns a plain answer that consists of words, in lower case and without \text{}, or None.

    Words have at least three letters ("Monday", "infinitely many"), or two capitals ("AB"), or are in
    \text{}. Three or more consecutive lower-case letters of the alphabet, such as xyz, are a product of
    variables.
    """
    inside = bare(text)
    if not _WORDLIKE.fullmatch(inside) or number(split_unit(text)[0]) is not None:
        return None
    runs = [run for run in re.findall("[a-zA-Z]+", inside) if run not in ("and", "or")]
    if not runs or {run.lower() for run in runs} & _MATH_WORDS:
        return None
    if re.search("[0-9][a-zA-Z]|[a-zA-Z][0-9(/]|[-/] *[0-9]|[0-9] *[-/]", inside):
        return None
    if re.fullmatch(r"[ (]*[A-Z][ ).:]*", inside):  # a choice, such as (C)
        return runs[0]
    if len(runs) == 1 and len(runs[0]) == 1:
        return None
    if "\\text" not in text and not any(_is_word(run) for run in runs):
        return None
    joined = " ".join(re.sub(r"[.,:;'!?&()-]", " ", inside).split())
    return joined.lower() if any(len(run) > 2 for run in runs) else joined


def _is_word(run):
    codes = sorted(map(ord, run))
    product = run.islower() and codes == list(range(codes[0], codes[0] + len(codes)))
    return (len(run) > 2 and not product) or (len(run) == 2 and run.isupper())


# -------------------------------------------------------------------------------------------- lists

_OPENING, _CLOSING = "([{", ")]}"


def split_list(text: str, spaced: bool = False) -> list[str]:
    r"""Splits a plain answer at commas, semicolons and conjunctions outside of brackets.

    Args:
      text: a plain answer.
      spaced: split only at commas before a space, so that "1,234, 5" has two members.
    """
    text = re.sub(r" *,? *(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]) *", ", ", text)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        comma = character == "," and not (spaced and text[i + 1 : i + 2] != " ")
        if depth == 0 and (comma or character == ";"):
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def brackets(text: str) -> str:
    r"""Returns the brackets around a whole text, such as "()", "[)" or "\{\}"; "" if there are none."""
    opening, closing = (r"\{", r"\}") if text.startswith(r"\{") else (text[:1], text[-1:])
    if opening not in ("(", "[", r"\{") or closing not in (")", "]", r"\}") or len(text) < 3:
        return ""
    if not text.endswith(closing):
        return ""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and character in _CLOSING:
            return opening + closing if i == len(text) - 1 else ""
    return ""

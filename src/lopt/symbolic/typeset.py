r"""Expressions as people read them: infix text for the terminal, and LaTeX.

Both print the operators' definitions, so nobody has to know that the library's `sqrt` is that of
the magnitude, or that its `pow` keeps the sign. Numbers get significant digits, never decimals: at
three digits 0.001234 is 0.00123, where cutting decimals would print zero.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from lopt.symbolic.expression import Constant, Expression, Node, Variable
from lopt.symbolic.signs import never_negative

SUM, PRODUCT, POWER, ATOM = range(4)

SYMBOLS: Mapping[str, str] = {
    "gradient": "g",
    "g": "g",
    "momentum": "m",
    "parameter": r"\theta",
    "rms": "v",
    "root_v": r"\hat{v}^{1/2}",
    "root": r"\hat{v}",
    "time": r"\tau",
    "step": r"\tau",
}
ACCENTS = {"_normalised": "tilde", "_normalized": "tilde", "_corrected": "hat"}
GREEK = re.compile(
    "alpha|beta|gamma|delta|epsilon|eta|theta|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|chi|psi"
)
NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
SPECIAL = {
    "\\": r"\backslash ",
    "^": r"\hat{\ }",
    "~": r"\sim ",
    " ": r"\ ",
    **{sign: "\\" + sign for sign in "{}$&#_%"},
}


@dataclasses.dataclass(frozen=True)
class Style:
    """The forms of a notation; `{}` stand for arguments.

    Attributes:
        number: (positive value, digits) to its text and how tightly that binds.
        feature: a variable to the same.
        times: between factors.
        dotted: between factors of which the second begins with a digit.
        parentheses, bars, ratio, power, root, indicator: forms with one or two arguments.
        divides: how tightly a numerator and a denominator must bind.
        function: an operator's name and its argument to a text.
        pair: the same for two arguments.
    """

    number: Callable[[float, int | None], tuple[str, int]]
    feature: Callable[[Variable], tuple[str, int]]
    times: str
    dotted: str
    parentheses: str
    bars: str
    ratio: str
    divides: tuple[int, int]
    power: str
    root: str
    indicator: str
    function: Callable[[str, str], str]
    pair: str


def significant(value: float, digits: int | None) -> str:
    """Returns a number with some significant digits; by default as many as it needs.

    Example:
        >>> significant(0.0012345, 3), significant(-2.0, 3), significant(0.1, None)
        ('0.00123', '-2', '0.1')
    """
    if digits is None:
        return repr(value).removesuffix(".0")
    if not 1 <= digits <= 17:
        raise ValueError(f"digits={digits} must be from 1 to 17; try 3.")
    return f"{value:.{digits}g}"


def _latex_number(value: float, digits: int | None) -> tuple[str, int]:
    mantissa, _, exponent = significant(value, digits).partition("e")
    if not exponent:
        return mantissa, ATOM
    power = f"10^{{{int(exponent)}}}"
    return (power, POWER) if mantissa == "1" else (rf"{mantissa} \cdot {power}", PRODUCT)


def _latex_symbol(name: str) -> str:
    for ending, accent in ACCENTS.items():
        if name.endswith(ending) and name != ending:
            return rf"\{accent}{{{_latex_symbol(name.removesuffix(ending))}}}"
    if name in SYMBOLS:
        return SYMBOLS[name]
    if GREEK.fullmatch(name):
        return "\\" + name
    if len(name) == 1 and name.isalpha():
        return name
    return rf"\mathrm{{{''.join(SPECIAL.get(sign, sign) for sign in name)}}}"


def _latex_feature(variable: Variable, symbols: Mapping[str, str]) -> tuple[str, int]:
    time = f"t-{variable.lag}" if variable.lag else "t"
    average = re.fullmatch(rf"average_{NUMBER}_(.+)", variable.name)
    warmup = re.fullmatch(rf"warmup_{NUMBER}", variable.name)
    symbol, number = _latex_name(variable.name)
    if variable.name in symbols:
        symbol = symbols[variable.name]
    elif warmup:
        return rf"\left(1 - {number}^{{{time}}}\right)", ATOM
    elif average:
        symbol, inner = _latex_name(average[2])
        inner = f"_{{{inner}}}" if inner else ""
        symbol, time = rf"\langle {symbol}{inner} \rangle", f"{_decimal(average[1])},{time}"
    elif number:
        time = f"{number},{time}"
    return f"{symbol}_{{{time}}}", POWER if "^" in symbol else ATOM


def _latex_name(name: str) -> tuple[str, str]:
    """Returns the symbol of a feature, and the number at the end of its name, if there is one."""
    numbered = re.fullmatch(f"(.+)_{NUMBER}", name)
    if numbered:
        return _latex_symbol(numbered[1]), _decimal(numbered[2])
    return _latex_symbol(name), ""


def _decimal(number: str) -> str:
    return np.format_float_positional(float(number), trim="-") if "e" in number else number


def _latex_function(name: str, argument: str) -> str:
    known = {"exp", "tanh", "sinh", "log", "max", "min"}
    other = {"sign": "sign", "asinh": "asinh", "relu": "ReLU", "erfc": "erfc"}
    command = "\\" + name if name in known else rf"\operatorname{{{other[name]}}}"
    return rf"{command}\left({argument}\right)"


TEXT = Style(
    number=lambda value, digits: (significant(value, digits), ATOM),
    feature=lambda variable: (str(variable), ATOM),
    times=" * ",
    dotted=" * ",
    parentheses="({})",
    bars="|{}|",
    ratio="{} / {}",
    divides=(PRODUCT, POWER),
    power="{}^{}",
    root="sqrt({})",
    indicator="[{} > {}]",
    function=lambda name, argument: f"{name}({argument})",
    pair="{}, {}",
)
LATEX = Style(
    number=_latex_number,
    feature=lambda variable: _latex_feature(variable, {}),
    times=r" \, ",
    dotted=r" \cdot ",
    parentheses=r"\left({}\right)",
    bars=r"\left|{}\right|",
    ratio=r"\frac{{{}}}{{{}}}",
    divides=(SUM, SUM),
    power="{}^{{{}}}",
    root=r"\sqrt{{{}}}",
    indicator=r"\mathbf{{1}}\left[{} > {}\right]",
    function=_latex_function,
    pair="{}, {}",
)


def to_text(expression: Expression, digits: int | None = None) -> str:
    """Returns an expression as infix text.

    Args:
        expression: what to print.
        digits: significant ones of its constants; by default all that they have.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> m, g = Variable("m", 1), Variable("gradient")
        >>> to_text(make_expression(("subtract", ("multiply", -0.5, m), ("sqrt", g))))
        '-0.5 * m[t-1] - sqrt(|gradient|)'
    """
    return _print(expression, TEXT, digits)


def to_latex(
    expression: Expression, digits: int | None = 3, symbols: Mapping[str, str] | None = None
) -> str:
    r"""Returns an expression as LaTeX for math mode.

    Args:
        expression: what to print.
        digits: significant ones of its constants; None for all that they have.
        symbols: LaTeX for names of features, instead of the library's: the gradient is g_{t},
            "m_normalised" one step ago \tilde{m}_{t-1}, "momentum_0.9" m_{0.9,t},
            "average_0.9_gradient" \langle g \rangle_{0.9,t}, "warmup_0.9"
            \left(1 - 0.9^{t}\right).

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> scaled = ("multiply", -0.001234, Variable("momentum_0.9"))
        >>> rule = ("divide", scaled, ("sqrt", Variable("v")))
        >>> print(to_latex(make_expression(rule)))
        -\frac{0.00123 \, m_{0.9,t}}{\sqrt{\left|v_{t}\right|}}
    """
    chosen = dict(symbols or {})
    style = dataclasses.replace(LATEX, feature=lambda variable: _latex_feature(variable, chosen))
    return _print(expression, style, digits)


def _print(expression: Expression, style: Style, digits: int | None) -> str:
    constants = np.asarray(expression.constants, float).tolist()
    negative, text, _ = _render(expression.root, constants, style, digits)
    return f"-{text}" if negative else text


# A sign, the text of what follows it, and how tightly that binds. Signs move outwards through
# products, so that sums can subtract.
_Rendered = tuple[bool, str, int]


def _render(node: Node, constants: list[float], style: Style, digits: int | None) -> _Rendered:
    if isinstance(node, Constant):
        value = constants[node.index]
        return value < 0, *style.number(abs(value), digits)
    if isinstance(node, Variable):
        return False, *style.feature(node)
    arguments = [_render(one, constants, style, digits) for one in node.arguments]

    def tight(one: _Rendered, level: int) -> str:
        """The text without its sign, in parentheses where it binds too loosely."""
        return one[1] if one[2] >= level else style.parentheses.format(one[1])

    def whole(one: _Rendered, level: int) -> str:
        """The text with its sign."""
        if one[0]:
            text = f"-{tight(one, PRODUCT)}"
            return style.parentheses.format(text) if level > SUM else text
        return tight(one, level)

    def plain(one: _Rendered) -> str:
        return whole(one, SUM)

    def magnitude(at: int) -> str:
        """What stands for |x|: without bars where x cannot be negative."""
        text = plain(arguments[at])
        return text if never_negative(node.arguments[at], constants) else style.bars.format(text)

    first, second = arguments[0], arguments[-1]
    match node.operator:
        case "add" | "subtract":
            minus = second[0] != (node.operator == "subtract")
            left, right = plain(first), tight(second, PRODUCT if minus else SUM)
            right = style.parentheses.format(right) if right.startswith("-") else right
            return False, f"{left} {'-' if minus else '+'} {right}", SUM
        case "multiply":
            # A number comes first.
            if isinstance(node.arguments[1], Constant) and node.arguments[0] != node.arguments[1]:
                first, second = second, first
            left, right = tight(first, PRODUCT), tight(second, PRODUCT)
            between = style.dotted if right[0].isdigit() else style.times
            return first[0] != second[0], f"{left}{between}{right}", PRODUCT
        case "divide":
            above, below = style.divides
            text = style.ratio.format(tight(first, above), tight(second, below))
            return first[0] != second[0], text, PRODUCT
        case "negative":
            return not first[0], tight(first, PRODUCT), max(first[2], PRODUCT)
        case "quotient":
            above, below = style.divides
            squared = style.power.format(whole((False, *second[1:]), ATOM), "2")
            root = style.root.format(f"1 + {squared}")
            return first[0], style.ratio.format(tight(first, above), root), PRODUCT
        case "square" | "cube":
            power = "2" if node.operator == "square" else "3"
            text = style.power.format(tight(first, ATOM), power)
            return first[0] and power == "3", text, POWER
        case "abs":
            return False, style.bars.format(tight(first, SUM)), ATOM
        case "sqrt":
            return False, style.root.format(magnitude(0)), ATOM
        case "log":
            tiny, _ = style.number(1e-8, None)
            return False, style.function("log", f"{magnitude(0)} + {tiny}"), ATOM
        case "pow":
            base, exponent = whole(first, ATOM), whole(second, SUM)
            if style is TEXT or second[2] < ATOM:
                exponent = whole(second, ATOM)
            if never_negative(node.arguments[0], constants):
                return False, style.power.format(base, exponent), POWER
            size = style.power.format(style.bars.format(plain(first)), exponent)
            sign = style.function("sign", plain(first))
            return False, f"{sign}{style.times}{size}", PRODUCT
        case "greater":
            return False, style.indicator.format(plain(first), plain(second)), ATOM
        case "max" | "min":
            pair = style.pair.format(plain(first), plain(second))
            return False, style.function(node.operator, pair), ATOM
        case _:
            return False, style.function(node.operator, plain(first)), ATOM

"""What is made of the code when the site is built: commands, names, and links to them.

`docs/commands/` has a page for each command of `lopt`, from its settings; `docs/api/lopt.md` lists
the names of the face. Code in single backticks that is a name, or a command, becomes a link.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_args

from docutils import nodes

import lopt
from lopt.experiment.cli import ABOUT, COMMANDS, options_of
from lopt.experiment.runs.registry import load_recipe, recipe_names
from lopt.experiment.settings import help_of

WINGS = ("core", "tasks", "learned", "estimators", "analysis", "symbolic", "torch")


def plain(text):
    """Returns text with Markdown's signs escaped, but for code: options are."""
    signs = r"(`[^`]*`)|(--[a-z][\w-]*)|([*_<\[|\\])"
    return re.sub(signs, lambda m: m[1] or (f"`{m[2]}`" if m[2] else f"\\{m[3]}"), text)


def table(head, rows):
    """Returns a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text):
    """Returns code, for a cell."""
    return f"`{text}`".replace("|", "\\|") if str(text) else ""


def row(name, kind, default, meaning):
    """Returns the row of a field."""
    missing = default in (None, (), dataclasses.MISSING)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    kind = kind.__name__ if type(kind) is type else str(kind).removeprefix("pathlib.")
    return [code(name), code(kind), "" if missing else code(shown), plain(meaning)]


def options(command):
    """Returns the arguments and options of a command, as a table."""
    rows = []
    for field in dataclasses.fields(options_of(command)):
        kind, *marks = get_args(field.type)
        shown = next(mark for mark in marks if hasattr(mark, "help"))
        marks = [repr(mark) for mark in marks]
        if "Suppress" not in marks:
            option = f"--{(shown.name or field.name).replace('_', '-')} {shown.metavar or ''}"
            name = field.name if "Positional" in marks else option.strip()
            name = command.subject.upper() if name == "subject" else name
            rows.append(row(name, kind, field.default, shown.help))
    return table(["argument", "type", "default", "meaning"], rows)


def recipes():
    """Yields the parts of a page on recipes: what each is, and its fields."""
    for name in recipe_names():
        recipe = load_recipe(name)
        about, meanings = help_of(recipe)
        rows = [
            row(field.name, field.type, field.default, meanings.get(field.name, ""))
            for field in dataclasses.fields(recipe)
        ]
        yield from (f"## The recipe {name}", about)
        yield table(["field", "type", "default", "meaning"], rows)


def pages():
    """Yields the path and the parts of every page that is made."""
    names = {name: name.replace(" ", "-") for name in COMMANDS}
    about = {name: inspect.getdoc(command.settings) for name, command in COMMANDS.items()}
    lines = {name: text.partition("\n")[0] for name, text in about.items()}
    rows = [[f"`lopt {name}`", plain(line)] for name, line in lines.items()]
    tree = "\n".join(["```{toctree}", ":hidden:", "", *names.values(), "```"])
    variables = [line.partition(": ") for line in ABOUT.splitlines() if line.startswith("LOPT_")]
    variables = table(["variable", "meaning"], [[f"`{v}`", plain(m)] for v, _, m in variables])
    head = ["# Commands", "Without arguments, `lopt` lists them."]
    yield "commands/index", [*head, table(["command", "what it does"], rows), variables, tree]
    for name, command in COMMANDS.items():
        more = recipes() if name == "recipes" else ()
        text = [plain(part) for part in about[name].split("\n\n")]
        arguments = options(command) if dataclasses.fields(options_of(command)) else ""
        yield f"commands/{names[name]}", [f"# lopt {name}", *text, arguments, *more]

    exported = [name for name in lopt.__all__ if callable(getattr(lopt, name))]
    docs = {name: inspect.getdoc(getattr(lopt, name)) or "" for name in exported}
    rows = [[f"`lopt.{name}`", plain(doc.partition("\n")[0])] for name, doc in docs.items()]
    head = ["# lopt", "What `import lopt` gives. Everything else is in the modules below it."]
    yield "api/lopt", [*head, table(["name", "what it is"], rows)]


def write(app):
    """Writes the pages, those that changed."""
    for name, parts in pages():
        path, text = Path(app.srcdir, f"{name}.md"), "\n\n".join(filter(None, parts)) + "\n"
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def targets(env):
    """Returns the page and the anchor of every name, as it may be written."""
    found = {n: (o.docname, o.node_id) for n, o in env.get_domain("py").objects.items()}
    short = {
        name.removeprefix(f"lopt.{wing}."): place
        for wing in WINGS
        for name, place in found.items()
        if name.startswith(f"lopt.{wing}.")
    }
    # Lower-case words stand for many things.
    names = {name: place for name, place in short.items() if name.lower() != name or "_" in name}
    for name in lopt.__all__:
        module = getattr(getattr(lopt, name), "__module__", "")
        for full in (f"{'.'.join(module.split('.')[:2])}.{name}", f"{module}.{name}"):
            if full in found:
                names[f"lopt.{name}"] = found[full]
    commands = {f"lopt {name}": (f"commands/{name.replace(' ', '-')}", "") for name in COMMANDS}
    return names | found | commands


def link(app, doctree, page):
    """Turns code that is a name or a command into a link."""
    known = targets(app.env)
    for node in list(doctree.findall(nodes.literal)):
        words = node.astext().partition("(")[0].split()
        keys = [" ".join(words[:count]) for count in (3, 2, 1) if len(words) >= count]
        keys = [key for key in keys if key in known]
        if keys and not isinstance(node.parent, nodes.reference):
            target, anchor = known[keys[0]]
            address = app.builder.get_relative_uri(page, target) + (f"#{anchor}" if anchor else "")
            found = nodes.reference("", "", node.deepcopy(), internal=True, refuri=address)
            node.replace_self(found)


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", write)
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Docstrings in Hugging Face's form, as griffe's parser of Google's form reads them.

- `name (type of shape [...], *optional*): text` becomes `name (type): Of shape [...]. text`.
- Attributes of a dataclass, which have no heading, get one.
- What is returned is a paragraph; its type stands in the signature.
- [`Name`] becomes a link where the reference has the name.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe


ROOT = Path(__file__).parents[2]
PACKAGES = {"modeling_vwlmm": ROOT / "modeling_vwlmm", "processing_vwlmm": ROOT / "processing"}
ENTRY = re.compile(r"(\w+(?:, \w+)*)(?: \((.+)\))?:(?: |$)")  # name (type): text


def find_names() -> dict[str, str]:
    """The dotted path of every public class and function of both packages, by its name."""
    names = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            module = ".".join((package, *file.relative_to(folder).with_suffix("").parts))
            for name in re.findall(r"^(?:class|def) ([A-Za-z]\w*)", file.read_text(), flags=re.MULTILINE):
                names.setdefault(name, f"{module}.{name}")
    return names


def rewrite(text: str, link: Callable[[str], str] = "`{}`".format, has_signature: bool = True) -> str:
    """
    A docstring in the form that griffe reads.

    Args:
        text (`str`): The docstring, without indentation.
        link (`Callable[[str], str]`, *optional*): What becomes of a name that is referred to.
        has_signature (`bool`, *optional*, defaults to `True`): Whether types and defaults stand in a signature, too.
    """
    text = re.sub(r"\[`~?([\w.]+)`\]", lambda found: link(found[1]), text)
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if (entry := ENTRY.match(line)) and entry[2]), None)
    if first is not None:  # attributes without a heading
        lines[first:] = ["Attributes:", *(line and f"    {line}" for line in lines[first:])]
    written, section = [], None
    while lines:
        line = lines.pop(0)
        if heading := re.fullmatch(r"(Args|Attributes|Returns):", line):
            section = heading[1]
            written += ["**Returns:**", ""] if section == "Returns" else [line]
        elif line and not line.startswith(" "):
            section = None
            written.append(line)
        elif section == "Returns":
            written.append(line.removeprefix("    "))
        elif section and (entry := ENTRY.match(line.removeprefix("    "))):
            more = []
            while lines and lines[0].startswith("        "):
                more.append(lines.pop(0))
            for name in entry[1].split(", "):
                begin = _begin(entry[2] or "", has_signature) + line[4 + entry.end() :]
                written += [f"    {name}{begin}".rstrip(), *more]
        else:
            written.append(line)
    return "\n".join(written)


def _begin(kind: str, has_signature: bool) -> str:
    """What stands between the name of an entry and its text: ` (type): Of shape [...]. Default: 1. `"""
    kind, _, default = kind.partition("*optional*")
    kind, default = kind.strip(" ,"), default.removeprefix(", defaults to ")
    types = re.findall(r"`([^`]+)`", kind)
    rest = re.sub(r"\[?`[^`]+`(\]\[[^\]]*\])?", "", kind).strip(" ,or")  # such as "of shape"
    types = types[:1] if rest else types or [] if has_signature else types or ["Any"]
    begin = f" ({' | '.join(types)}): " if types else ": "
    if rest:
        shape = kind.partition(f"`{types[0]}`")[2].removeprefix("]").strip()
        begin += f"{shape[:1].upper()}{shape[1:]}. "
    return begin if has_signature or not default else f"{begin}Default: {default}. "


class HuggingFaceDocstrings(griffe.Extension):
    """
    Rewrites every docstring before it is parsed.

    Args:
        pages (`list[str]`): Modules that have a page in the reference.
    """

    def __init__(self, pages: list[str]) -> None:
        super().__init__()
        self.names, self.pages = find_names(), set(pages)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute that it has read."""
        if obj.docstring is not None:
            # A class without a constructor of its own, such as a config of Transformers.
            is_bare = obj.is_class and "__init__" not in obj.members and "dataclass" not in obj.labels
            obj.docstring.value = rewrite(obj.docstring.value, self._link, has_signature=not is_bare)

    def _link(self, name: str) -> str:
        path = self.names.get(name.split(".")[0], "")
        return f"[`{name}`][{path}]" if path.rpartition(".")[0] in self.pages else f"`{name}`"

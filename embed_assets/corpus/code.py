"""Finds the classes and functions of source code, which are its headings, by the grammars of tree-sitter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from embed_assets.errors import SettingsError

_GRAMMARS: dict[str, tuple[str, str]] = {
    "text/x-python": ("tree_sitter_python", "language"),
    "text/x-javascript": ("tree_sitter_javascript", "language"),
    "text/x-typescript": ("tree_sitter_typescript", "language_typescript"),
    "text/x-tsx": ("tree_sitter_typescript", "language_tsx"),
    "text/x-go": ("tree_sitter_go", "language"),
    "text/x-rust": ("tree_sitter_rust", "language"),
    "text/x-java": ("tree_sitter_java", "language"),
    "text/x-c": ("tree_sitter_c", "language"),
    "text/x-c++": ("tree_sitter_cpp", "language"),
    "text/x-csharp": ("tree_sitter_c_sharp", "language"),
    "text/x-ruby": ("tree_sitter_ruby", "language"),
    "text/x-php": ("tree_sitter_php", "language_php"),
    "text/x-sh": ("tree_sitter_bash", "language"),
}
"""Module and function of each language's grammar, by media type."""
_SUFFIXES: dict[str, str] = {
    "text/x-python": ".py .pyi",
    "text/x-javascript": ".js .mjs .cjs .jsx",
    "text/x-typescript": ".ts .mts .cts",
    "text/x-tsx": ".tsx",
    "text/x-go": ".go",
    "text/x-rust": ".rs",
    "text/x-java": ".java",
    "text/x-c": ".c",
    "text/x-c++": ".h .hh .hpp .cc .cpp .cxx",
    "text/x-csharp": ".cs",
    "text/x-ruby": ".rb",
    "text/x-php": ".php",
    "text/x-sh": ".sh .bash",
    "text/x-code": ".sql .lua .pl .pm .r .jl .kt .kts .swift .scala .clj .hs .ml .ex .exs .erl .dart .f90 .vb .ps1",
}
CODE_FORMATS = {suffix: media for media, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
"""Media type by file name suffix. 'text/x-code' has no grammar: it is cut at lines."""
_CODE_TYPES = frozenset(_SUFFIXES)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONTAINERS = _words(
    """class_definition class_declaration abstract_class_declaration interface_declaration enum_declaration
    class_specifier struct_specifier struct_declaration record_declaration trait_declaration trait_item impl_item
    mod_item module class namespace_definition namespace_declaration internal_module"""
)
"""Node types of definitions whose own definitions count too."""
_FUNCTIONS = _words(
    """function_definition function_declaration generator_function_declaration function_item macro_definition
    struct_item enum_item method method_definition method_declaration singleton_method constructor_declaration
    type_spec type_alias_declaration"""
)
"""Node types of other definitions."""
_WRAPPERS = _words(
    """decorated_definition export_statement template_declaration type_declaration expression_statement
    lexical_declaration variable_declaration"""
)
"""What stands around a single definition."""
_TRANSPARENT = _words(
    """preproc_ifdef preproc_if preproc_else linkage_specification declaration_list
    file_scoped_namespace_declaration"""
)
"""Blocks whose definitions are those of the block around them."""
_NAMES = ("name", "declarator", "type")
_ABOVE = _words("comment line_comment block_comment attribute_item decorator marker_annotation")
"""What belongs to the definition below it."""
_MAX_DEPTH = 8
"""Of classes inside classes. Deeper ones are part of the outer ones, so that hostile code can't exhaust the stack."""


def is_code(media_type: str) -> bool:
    """Whether a text is source code."""
    return media_type in _CODE_TYPES


def require_grammar(media_type: str) -> None:
    """Raise ``ImportError`` if code of this type has a grammar that is not installed here."""
    if media_type in _GRAMMARS:
        import_module("tree_sitter")
        import_module(_GRAMMARS[media_type][0])


class Definition(NamedTuple):
    """A class or function, or what follows the last one of a block."""

    start: int
    """Code point of the start of its line, or of the comments above it."""
    depth: int
    """1 is outermost."""
    name: str
    """'' of what follows a block's last definition."""
    body: int
    """Code point where its body begins."""


def definitions(text: str, media_type: str) -> list[Definition]:
    """The classes and functions of source code, in order; none for code without a grammar.

    Raises ``SettingsError`` if the grammar is not installed.
    """
    if media_type not in _GRAMMARS:
        return []
    data = text.encode("utf-8", "surrogatepass")
    root = _parser(media_type).parse(data).root_node
    found = list(_found(root.named_children, 1))
    if len(data) == len(text):
        return found
    first_bytes = np.frombuffer(data, np.uint8) & 0xC0 != 0x80
    code_points = np.concatenate([[0], np.cumsum(first_bytes)])
    return [d._replace(start=int(code_points[d.start]), body=int(code_points[d.body])) for d in found]


@lru_cache
def _parser(media_type: str) -> Any:
    module, function = _GRAMMARS[media_type]
    try:
        from tree_sitter import Language, Parser

        return Parser(Language(getattr(import_module(module), function)()))
    except ImportError:
        raise SettingsError(
            f"splitting {media_type} needs the extra 'code': pip install 'embed-assets[code]' on every machine"
        ) from None


def _found(nodes: Sequence[Any], depth: int) -> Iterator[Definition]:
    """Definitions among the nodes of a block, with byte offsets of the starts of their lines."""
    above = None
    is_open = False
    for node in nodes:
        if above is not None and node.start_point[0] > above[1] + 1:
            above = None
        start = _line_start(node) if above is None else above[0]
        definition = _definition(node)
        if definition is not None:
            yield Definition(start, depth, _name(definition), _body_start(definition))
            is_open = True
            if definition.type in _CONTAINERS and depth < _MAX_DEPTH:
                yield from _found(_body(definition), depth + 1)
        elif node.type in _TRANSPARENT:
            yield from _found(node.named_children, depth)
        elif node.type in _ABOVE:
            above = start, node.end_point[0]
            continue
        elif is_open:
            yield Definition(start, depth, "", start)
            is_open = False
        above = None


def _line_start(node: Any) -> int:
    return int(node.start_byte - node.start_point[1])


def _definition(node: Any) -> Any:
    """The definition that a node is, or is around; None if it is neither."""
    for _ in range(3):
        if node.type in _FUNCTIONS:
            return node
        if node.type in _CONTAINERS:
            return node if node.child_by_field_name("body") is not None or node.type in ("module", "class") else None
        if node.type not in _WRAPPERS:
            return None
        inner = node.child_by_field_name("definition") or node.child_by_field_name("declaration")
        inner = inner or next(iter(reversed(node.named_children)), None)
        if inner is None:
            return None
        if inner.type == "variable_declarator":  # const name = () => ...
            value = inner.child_by_field_name("value")
            return inner if value is not None and "function" in value.type else None
        node = inner
    return None


def _body_start(definition: Any) -> int:
    """Where the body begins, after its brace."""
    body = definition.child_by_field_name("body")
    if body is None:
        return int(definition.start_byte)
    return int(body.start_byte) + int(body.text[:1] == b"{")


def _body(definition: Any) -> Sequence[Any]:
    body = definition.child_by_field_name("body")
    return [] if body is None else list(body.named_children)


def _name(definition: Any) -> str:
    """The name of a definition: of a C function, what its declarator declares; of Rust's impl, its type."""
    node = definition
    for _ in range(6):
        found = next((n for name in _NAMES if (n := node.child_by_field_name(name)) is not None), None)
        if found is None:
            break
        node = found
        if not node.type.endswith("declarator"):
            break
    text = node.text.decode("utf-8", "replace") if node is not definition and node.text else definition.type
    return " ".join(text.split())

"""The public names of the package, read from its source: nothing is imported."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def body_of(module: str) -> list[ast.stmt]:
    """The statements of a module, those under `if TYPE_CHECKING` among them."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = []
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        body += node.body if isinstance(node, ast.If) else [node]
    return body


def exists(module: str) -> bool:
    """Whether there is such a module or package."""
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py").exists() or path.with_suffix(".py").exists()


@cache
def packages() -> dict[str, list[str]]:
    """Packages that say what they offer, with their `__all__`."""
    found = {}
    for path in sorted((ROOT / "lorsa_lens").rglob("__init__.py")):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        for node in body_of(package):
            if assigned(node) == "__all__":
                found[package] = ast.literal_eval(node.value)
    return found


def assigned(node: ast.stmt) -> str | None:
    """The name that a statement assigns to."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return getattr(target, "id", None)


def defined(module: str, name: str) -> tuple[ast.stmt, ast.stmt | None] | None:
    """The statement that defines a name, and the one after it; imports are followed."""
    body = body_of(module)
    following = [*body[1:], None]
    for node, after in reversed(list(zip(body, following, strict=True))):  # overloads come first
        is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        if is_definition or assigned(node) == name:
            return node, after
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorsa_lens"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return defined(str(node.module), alias.name)
    return None


def docstring(module: str, name: str) -> str | None:
    """What stands in or, for a constant, under the definition of a name."""
    found = defined(module, name)
    if found is None:
        return None
    node, after = found
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return ast.get_docstring(node)
    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return after.value.value if is_text else None

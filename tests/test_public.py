"""The public surface: documented, annotated, and nothing else."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing
from types import ModuleType
from typing import Any

import pytest

import seawall
import seawall.testing

PUBLIC = {
    seawall: [
        "EXPOSE_HEADERS",
        "ConfigError",
        "Decision",
        "LimitExceeded",
        "LoadSheddingMiddleware",
        "MemoryBackend",
        "Policy",
        "PriorityAdmissionMiddleware",
        "QuotaMiddleware",
        "RateLimitMiddleware",
        "Refusal",
        "Seawall",
        "__version__",
        "charge",
        "limit",
        "load",
        "metrics_app",
        "reload",
        "time_left",
        "usage",
    ],
    seawall.testing: ["Answer", "ManualClock", "disabled", "drive", "reset"],
}

NAMES = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module, names in PUBLIC.items()
    for name in names
    if callable(getattr(module, name))
]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_is_what_users_need_and_no_more(module: ModuleType) -> None:
    assert sorted(module.__all__) == sorted(PUBLIC[module])
    assert all(hasattr(module, name) for name in module.__all__)


def test_nothing_else_is_importable_by_a_public_name() -> None:
    """Modules of the package aside: ``import seawall.testing`` makes an attribute of it."""
    found = {name for name, value in vars(seawall).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert found == set(seawall.__all__) - {"__version__"}
    modules = {name for name, value in vars(seawall).items() if inspect.ismodule(value)}
    assert modules <= {module.name for module in pkgutil.iter_modules(seawall.__path__)}


def test_a_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from seawall import *", names)
    assert set(names) - {"__builtins__"} == set(seawall.__all__)


def members(value: Any) -> list[tuple[str, Any]]:
    """What a public name is made of, itself included: its own public methods and properties, without those of bases."""
    found = [(value.__name__, value)]
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                found.append((f"{value.__name__}.{name}", member))
    return found


@pytest.mark.parametrize("value", NAMES)
def test_every_public_name_is_documented(value: Any) -> None:
    for name, member in members(value):
        documentation = inspect.getdoc(member)
        assert documentation, f"{name} has no docstring"
        first = documentation.splitlines()[0]
        assert first[0].isupper() or first[0] in "`\"'", f"{name}: {first}"


def function_of(value: Any) -> Any:
    return value.__init__ if inspect.isclass(value) else value.fget if isinstance(value, property) else value


@pytest.mark.parametrize("value", NAMES)
def test_every_public_name_is_annotated(value: Any) -> None:
    for name, member in members(value):
        function = function_of(member)
        if not inspect.isfunction(function):
            continue  # inherited from a builtin
        for parameter in list(inspect.signature(function).parameters.values()):
            if parameter.name != "self":
                assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name})"
        returns = inspect.signature(function).return_annotation
        assert returns is not inspect.Signature.empty, f"{name} ->"


@pytest.mark.parametrize("value", NAMES)
def test_no_public_signature_says_any_where_it_returns(value: Any) -> None:
    function = function_of(value)
    if inspect.isfunction(function):
        assert inspect.signature(function).return_annotation not in ("Any", Any), value


def test_the_public_annotations_can_be_resolved() -> None:
    for function in (seawall.charge, seawall.usage, seawall.time_left, seawall.metrics_app):
        typing.get_type_hints(function)


def test_the_three_middlewares_take_the_same_arguments_beside_their_own() -> None:
    def parameters(kind: Any) -> dict[str, Any]:
        return dict(inspect.signature(kind.__init__).parameters)

    shared = ["self", "app", "config", "backend", "identify", "on_reject", "registry", "clock"]
    own = {
        seawall.Seawall: ["default", "tenants"],
        seawall.RateLimitMiddleware: ["limit", "per"],
        seawall.QuotaMiddleware: ["limit", "zone", "per"],
    }
    for kind, names in own.items():
        found = parameters(kind)
        assert sorted(found) == sorted(shared + names)
        assert list(found)[:3] == ["self", "app", "config"]
        for name in set(found) - {"self", "app", "config"}:
            assert found[name].kind is inspect.Parameter.KEYWORD_ONLY, f"{kind.__name__}({name})"


def all_modules() -> list[str]:
    found = ["seawall"]
    found += [module.name for module in pkgutil.walk_packages(seawall.__path__, "seawall.")]
    return [name for name in found if ".cli" not in name and "__main__" not in name]


@pytest.mark.parametrize("name", all_modules())
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in finder.find(module, name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", all_modules())
def test_every_module_opens_with_what_it_is_about(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip()


@pytest.mark.slow
def test_importing_it_imports_no_server_no_terminal_and_no_client() -> None:
    code = (
        "import sys, seawall, seawall.testing; "
        "print(*sorted({'redis', 'uvicorn', 'typer', 'rich', 'fastapi', 'httpx', 'httpx2'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert answer.stdout.strip() == ""


def test_a_config_error_is_a_value_error_that_prints_as_its_diagnostics() -> None:
    with pytest.raises(seawall.ConfigError) as caught:
        seawall.Seawall(lambda: None, config={"version": 1, "plans": {"a": {"rate": "10/dya", "concurency": 1}}})  # type: ignore[arg-type, misc]
    assert "did you mean 'day'?" in str(caught.value)
    assert "unknown key 'concurency'" in str(caught.value)


def test_values_are_frozen_and_compare() -> None:
    one = seawall.Decision(True, "rate", 5, 4, 0.0, 60.0)
    assert one == seawall.Decision(True, "rate", 5, 4, 0.0, 60.0)
    with pytest.raises(AttributeError):
        one.remaining = 9  # type: ignore[misc]
    assert seawall.Refusal(429, "rate").policies == ()

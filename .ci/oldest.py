"""Print, as requirements, the oldest version that pyproject.toml allows of everything a user installs with Seawall."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FRAMEWORK = [requirement for requirement in EXTRAS["dev"] if requirement.startswith("fastapi")]

for requirement in (*PROJECT["dependencies"], *EXTRAS["redis"], *EXTRAS["client"], *EXTRAS["cli"], *FRAMEWORK):
    name, version, marker = re.fullmatch(r"([\w-]+)>=([\d.]+)\s*(;.*)?", requirement).groups(default="")
    # The newest fix of the oldest series, except where a bound names a fix: that one is meant.
    print(f"{name}=={version}{'' if version.count('.') > 1 else '.*'}{marker}")

"The package's metadata, read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

extras = {key.removesuffix("_requirements"): value.split()
          for key, value in settings.items() if key.endswith("_requirements")}
apart = {"dev", "trackio", "mlflow", "wandb"}  # trackers bring servers of their own; whoever wants one names it
extras["all"] = sorted({requirement for name, extra in extras.items() if name not in apart for requirement in extra})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    url=settings["git_url"],
    keywords=settings["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={settings['min_python']}",
    packages=[settings["lib_name"]],
    package_data={settings["lib_name"]: ["assets/**/*"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": ["leximl=leximl._modidx:d"],  # links to this package's pages from any nbdev site
    },
)

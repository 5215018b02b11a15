"""Finding a user's code: by file, by module, by what packages publish; and what is said where it is not found."""

import sys
from pathlib import Path

import pytest

from diffalign import plugins
from diffalign.errors import ConfigError
from tests.plugged import forget, publish

CODE = "class Mine:\n    '''Do something.\n\n    More.'''\n"


def test_a_file_and_a_module_are_two_ways_to_one_class(own_folder):
    (own_folder / "mine.py").write_text(CODE)
    found = [plugins.load(address) for address in ("mine:Mine", "mine.py:Mine", f"{own_folder}/mine.py:Mine")]
    assert {plugin.value.__name__ for plugin in found} == {"Mine"}
    assert {plugin.file for plugin in found} == {own_folder / "mine.py"}
    assert len({plugin.source for plugin in found}) == 1
    assert str(own_folder) not in sys.path


def test_it_may_import_what_lies_beside_it(own_folder):
    (own_folder / "beside.py").write_text(CODE)
    (own_folder / "deeper").mkdir()
    for file in ("mine.py", "deeper/mine.py"):
        (own_folder / file).write_text("from beside import Mine\n")
        assert plugins.load(f"{file}:Mine").value.__module__ == "beside"


def test_files_of_one_name_do_not_meet(own_folder):
    for folder in ("a", "b"):
        (own_folder / folder).mkdir()
        (own_folder / folder / "mine.py").write_text(f"class Mine:\n    folder = '{folder}'\n")
    assert [plugins.load(f"{folder}/mine.py:Mine").value.folder for folder in ("a", "b")] == ["a", "b"]


def test_the_source_is_that_of_the_class_too(own_folder):
    """Named by a file that only hands it on, a class is still known by where it is written."""
    (own_folder / "mine.py").write_text("from beside import Mine\n")
    sources = []
    for text in (CODE, CODE + "\n"):
        (own_folder / "beside.py").write_text(text)
        sources.append(plugins.load("mine:Mine").source)
        forget(own_folder)
    assert sources[0] != sources[1]


def test_a_running_process_keeps_what_it_loaded(own_folder):
    (own_folder / "mine.py").write_text(CODE)
    before = plugins.load("mine.py:Mine")
    (own_folder / "mine.py").write_text("broken(")
    assert plugins.load("mine.py:Mine") == before


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mine", '"mine" must be MODULE:NAME or FILE.py:NAME'),
        (":Mine", '":Mine" must be MODULE:NAME'),
        ("mine:", '"mine:" must be MODULE:NAME'),
        ("mien:Mine", 'There is no module "mien", neither in {here} nor installed. Did you mean "mine"?'),
        ("mine.more:Mine", 'There is no module "mine.more"'),
        ("mien.py:Mine", 'There is no file mien.py. Did you mean "mine.py"? Paths start at {here}.'),
        ("no/where/mine.py:Mine", "There is no file no/where/mine.py. Paths start at {here}."),
        (r"C:\mine.py:Mine", r"There is no file C:\mine.py."),
        ("mine:Mein", '{here}/mine.py has no "Mein". Did you mean "Mine"?'),
        ("mine.py:Other", '{here}/mine.py has no "Other". It defines Mine.'),
        ("empty:Other", '{here}/empty.py has no "Other". It defines nothing.'),
        ("syntax.py:X", "syntax.py cannot be loaded: SyntaxError: '(' was never closed ({here}/syntax.py, line 2)"),
        (
            "fails:X",
            "The module \"fails\" cannot be loaded: NameError: name 'y' is not defined ({here}/fails.py, line 3)",
        ),
        ("needs:X", "ModuleNotFoundError: No module named 'nowhere_at_all' ({here}/needs.py, line 1)"),
    ],
)
def test_mistakes_are_answered_with_the_fix(own_folder, address, message):
    texts = {
        "mine": CODE,
        "empty": "",
        "syntax": "\nx = (\n",
        "fails": "import ast\n\nx = y\n",
        "needs": "import nowhere_at_all",
    }
    for name, text in texts.items():
        (own_folder / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        plugins.load(address)
    assert message.format(here=own_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_failed_is_loaded_again_once_it_is_mended(own_folder):
    (own_folder / "mine.py").write_text("x = (")
    with pytest.raises(ConfigError):
        plugins.load("mine.py:Mine")
    (own_folder / "mine.py").write_text(CODE)
    assert plugins.load("mine.py:Mine").value.__name__ == "Mine"


@pytest.fixture
def installed(own_folder, monkeypatch):
    """Return a folder of installed packages."""
    monkeypatch.syspath_prepend(str(own_folder / "site"))
    return own_folder / "site"


def address(name):
    return plugins.address(name, plugins.SCORERS, ["oracle"])


def test_packages_publish_names(installed):
    publish(installed, "[diffalign.scorers]\nmine = mine_package.judge:Mine\n[diffalign.objectives]\nother = a:B\n")
    (installed / "mine_package").mkdir()
    (installed / "mine_package" / "judge.py").write_text(CODE)
    forget(installed)
    assert list(plugins.published(plugins.SCORERS)) == ["mine"]
    assert address("mine") == "mine_package.judge:Mine"
    assert address("oracle") is address("unknown") is None
    assert plugins.load(address("mine")).file == installed / "mine_package" / "judge.py"
    assert list(plugins.listed(plugins.SCORERS, ["oracle"])) == [("mine", "Do something. (x 0.1)")]


def test_a_broken_package_is_listed_with_the_reason(installed):
    publish(installed, "[diffalign.scorers]\nmine = nowhere_at_all:Mine\n")
    forget(installed)
    ((name, about),) = plugins.listed(plugins.SCORERS, [])
    assert name == "mine"
    assert about.startswith('cannot be used: There is no module "nowhere_at_all"')
    assert about.endswith("(x 0.1)")


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (["x"], 'x 0.1 publishes "oracle" in diffalign.scorers, a name that is built in.'),
        (["x", "y"], "a name that is built in."),
    ],
)
def test_a_name_that_is_built_in_is_refused(installed, packages, message):
    for package in packages:
        publish(installed, "[diffalign.scorers]\noracle = mine:Mine\n", package)
    forget(installed)
    with pytest.raises(ConfigError) as caught:
        address("oracle")
    assert message in str(caught.value)
    assert "by its address, mine:Mine, it can be used as it is" in str(caught.value)
    assert "cannot be used" in next(plugins.listed(plugins.SCORERS, ["oracle"]))[1]


def test_a_name_that_two_packages_publish_is_refused(installed):
    for package in ("x", "y"):
        publish(installed, "[diffalign.scorers]\nmine = mine:Mine\n", package)
    forget(installed)
    with pytest.raises(ConfigError, match=r'[xy] 0\.1 publishes "mine" .*, a name that [xy] 0\.1 publishes too'):
        address("mine")


def test_an_exception_is_told_with_the_last_line_of_the_plugin(own_folder):
    (own_folder / "mine.py").write_text("import json\n\ndef mine():\n    return json.loads('{')\n")
    mine = plugins.load("mine:mine").value
    with pytest.raises(ConfigError, match=rf"^mine: JSONDecodeError: .* \({Path(own_folder, 'mine.py')}, line 4\)$"):
        with plugins.told("mine", own_folder):
            mine()

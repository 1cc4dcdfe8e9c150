"""Make the text of ``kvsharer --help``.

`main` prints the text if nothing but help is asked for. Hydra would print the same text, but it
opens all of its configuration sources again for every group that it lists, which takes most of a
second. Here the configuration is composed once. ``conf/config.yaml`` holds the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from kvsharer_exp.cli.argv import user_folders
from kvsharer_exp.cli.config.groups import groups
from kvsharer_exp.cli.quoting import in_quotes
from kvsharer_exp.model.folders import data_dir

FLAGS = ("--help", "-h")


def is_plain(arguments: Sequence[str]) -> bool:
    """Whether ``arguments`` in Hydra's form ask Hydra for help and nothing else.

    Then there is no flag but those that name a folder of groups, and no override of Hydra's own but
    ``hydra.searchpath``.
    """
    _, words = user_folders(arguments)
    flags = [word for word in words if word.startswith("-")]
    hydras = [word for word in words if word.lstrip("+~").startswith("hydra")]
    return len(flags) == 1 and flags[0] in FLAGS and not hydras


def help_text(arguments: Sequence[str]) -> str:
    """List commands, groups with their choices, and every key with its value for ``arguments``."""
    folders, words = user_folders(arguments)
    overrides = [word for word in words if not word.startswith("-")]
    if folders:
        overrides.append(f"hydra.searchpath=[{','.join(map(in_quotes, folders))}]")
    with initialize_config_dir(str(data_dir("conf")), version_base="1.3"):
        composed = compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    template = Template(composed.hydra.help.template)
    listed = "".join(
        f"{name}: {', '.join(choices)}\n" for name, choices in sorted(groups(folders).items())
    )
    with open_dict(composed):
        del composed["hydra"]
    return template.substitute(APP_CONFIG_GROUPS=listed, CONFIG=OmegaConf.to_yaml(composed))

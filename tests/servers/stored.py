"""Read a study in a server as Optuna itself does, past all that this project keeps in memory."""

import optuna
from optuna.trial import FrozenTrial


def stored_trials(database: str, study: str) -> list[FrozenTrial]:
    url = database.replace("postgresql:", "postgresql+psycopg:")
    return optuna.load_study(study_name=study, storage=url).get_trials()

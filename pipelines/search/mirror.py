"""A copy of a study in a storage of Optuna, which its dashboards open.

The journal stays what counts: the copy is only written. Finished trials are added in the order in
which they finished, and what a killed run had not added follows with the next one.
"""

import warnings
from typing import Any

from pipelines.errors import InputError
from pipelines.search.goals import Goals
from pipelines.search.plan import StudyPlan
from pipelines.search.samplers import as_parameters, distributions_of, library
from pipelines.search.study import Study

_KEY = "poise_fingerprint"


class Mirror:
    """The copy of one study.

    Args:
        url: of the storage, such as sqlite:///studies.db.
        name: of the study in it.

    Raises:
        InputError: Optuna is not installed, the storage cannot be opened, or it holds another study
            of this name.
    """

    def __init__(self, plan: StudyPlan, url: str, name: str) -> None:
        self._optuna = library("optuna")
        self._plan, self._distributions = plan, distributions_of(plan.space)
        modes = [each.mode for each in plan.config.objectives]
        directions = ["maximize" if mode == "max" else "minimize" for mode in modes]
        try:
            self._copy = self._optuna.create_study(
                storage=url, study_name=name, directions=directions, load_if_exists=True
            )
            found = self._copy.user_attrs.get(_KEY)
        except Exception as error:  # of SQLAlchemy, its drivers, or Optuna
            raise InputError(
                f"optuna_storage: cannot be opened: {type(error).__name__}"  # not its URL
            ) from None
        if found not in (None, plan.key) or (found is None and self._copy.trials):
            raise InputError(
                f"optuna_storage: holds another study {name!r}; choose another storage, or another "
                "name for the output"
            )
        self._copy.set_user_attr(_KEY, plan.key)
        labels = [each.label for each in plan.config.objectives]
        with warnings.catch_warnings():  # that the interface may change
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._copy.set_metric_names(labels)
        self._num_added = len(self._copy.get_trials(deepcopy=False))

    def update(self, study: Study, goals: Goals) -> None:
        """Add the trials that have finished since."""
        for number in study.order[self._num_added :]:
            trial = study.trials[number]
            attributes: dict[str, Any] = {"number": number, "state": trial.state}
            attributes["parameters"] = self._plan.space.fields(trial.point)
            violations = goals.violations(trial.values)
            self._copy.add_trial(
                self._optuna.trial.create_trial(
                    values=[each.value(trial.values) for each in goals.objectives],
                    user_attrs=attributes,
                    constraints={str(i): value for i, value in enumerate(violations)} or None,
                    **as_parameters(trial.point, self._distributions),
                )
            )
            self._num_added += 1

"""Which configs a sweep tries next, as optuna's TPE sampler has it: for spaces too large to enumerate. Needs `vidrial-dsl[optuna]`.

Like `Search` it keeps no state: what was tried becomes the sampler's history, in the order of declaration, so the same trials and the
same seed name the same next configs, whichever GPU was done first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vidrial.device import Device
from vidrial.errors import ToolchainError
from vidrial.spec.choices import axes, config_order, flatten, unflatten
from vidrial.spec.op import Op

# Configs proposed at a time; draws, most of them illegal perhaps, before the space counts as exhausted.
BATCH, DRAWS = 8, 300
# Draws that optuna makes at random before it models anything.
STARTUP = 16


class OptunaSearch:
    """The strategy for one problem.

    Raises:
        ToolchainError: optuna is not installed.
    """

    def __init__(self, op: Op, problem: Any, device: Device, seed: int = 0) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ToolchainError(f"optuna cannot be imported ({error}); install it: pip install vidrial-dsl[optuna]") from None
        self._optuna, self._op, self._problem, self._device, self._seed = optuna, op, problem, device, seed
        self._axes = axes(op.config)
        categorical = optuna.distributions.CategoricalDistribution
        self._distributions: dict[str, Any] = {name: categorical(tuple(range(len(values)))) for name, values in self._axes.items()}

    def propose(self, seen: Mapping[Any, float]) -> list[Any]:
        """Up to BATCH legal configs that were not tried yet; none if none was found."""
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=self._seed + len(seen))
        study = optuna.create_study(sampler=sampler)
        for config in sorted(seen, key=config_order):
            study.add_trial(self._finished(config, seen[config]))
        default = self._op.config()
        found: dict[Any, None] = {default: None} if not seen and self._legal(default) else {}
        for _ in range(DRAWS):
            if len(found) == BATCH:
                break
            trial = study.ask(self._distributions)
            config = unflatten(self._op.config, {name: self._axes[name][i] for name, i in trial.params.items()})
            if config in seen or config in found:
                continue
            if self._legal(config):
                found[config] = None
            else:
                # The sampler turns away from what breaks a rule as from what failed.
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return list(found)

    def _legal(self, config: Any) -> bool:
        return self._op.reject(self._problem, config, self._device) is None

    def _finished(self, config: Any, ms: float) -> Any:
        create, states = self._optuna.trial.create_trial, self._optuna.trial.TrialState
        params = {name: self._axes[name].index(value) for name, value in flatten(config).items() if value in self._axes[name]}
        if math.isfinite(ms) and len(params) == len(self._axes):
            return create(state=states.COMPLETE, value=ms, params=params, distributions=self._distributions)
        return create(state=states.FAIL)

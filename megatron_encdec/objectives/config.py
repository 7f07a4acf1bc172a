"""`phases.N.objective`: a name, `{name: mlm, mask_ratio: 0.4}`, or the command line's short `mlm:0.4`.

    1. `OBJECTIVES`         every objective by its name
    2. `ObjectiveConfig`    one of them with its settings
"""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_encdec.objectives.base import Objective
from megatron_encdec.objectives.clm import CLM
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.platform import schema
from megatron_encdec.platform.errors import UserError

OBJECTIVES: dict[str, type[Objective]] = {one.name: one for one in (CLM, MLM)}


@dataclass
class ObjectiveConfig:
    """Which objective, and its settings (None: the default; settings of mlm are refused for clm).

    mlm: `mask_ratio` in (0, 1), the share of ordinary tokens to predict (0.4); of these, `mask_fraction`
    become the mask token (1.0), `random_fraction` a random token (0.0), the rest stay. BERT's 80/10/10 is
    0.8 and 0.1.
    """

    name: Literal[tuple(OBJECTIVES)]
    mask_ratio: float | None = None
    mask_fraction: float | None = None
    random_fraction: float | None = None

    def __post_init__(self):
        defaults = {"mask_ratio": 0.4, "mask_fraction": 1.0, "random_fraction": 0.0}
        for key, default in defaults.items():
            value = getattr(self, key)
            if self.name != "mlm" and value is not None:
                raise ValueError(f"{key}: is a setting of mlm; {self.name} has none")
            if self.name == "mlm" and value is None:
                setattr(self, key, default)
        if self.name == "mlm":
            self._check_fractions()

    def _check_fractions(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio: must be above 0 and below 1, found {self.mask_ratio}")
        for key in ("mask_fraction", "random_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: must be from 0 to 1, found {getattr(self, key)}")
        if self.mask_fraction + self.random_fraction > 1 + 1e-9:
            raise ValueError(f"random_fraction: with mask_fraction {self.mask_fraction} at most "
                             f"{1 - self.mask_fraction:.4g} remains, found {self.random_fraction}")

    @classmethod
    def from_yaml(cls, value: Any, where: str) -> "ObjectiveConfig":
        """From a mapping or a string `clm`, `mlm`, `mlm:MASK_RATIO`; `where` is its full dotted key."""
        if not isinstance(value, str):
            if not isinstance(value, dict):
                raise UserError(f"{where}: expected clm, mlm, mlm:0.4 or a mapping such as "
                                f"{{name: mlm, mask_ratio: 0.4}}, found {value!r}")
            return schema.build(cls, value, where)
        name, colon, ratio = value.partition(":")
        data: dict[str, Any] = {"name": name.strip()}
        if colon:
            try:
                data["mask_ratio"] = float(ratio)
            except ValueError:
                raise UserError(f"{where}: {value!r}: after the colon comes a mask ratio, such as "
                                "mlm:0.4") from None
        return schema.build(cls, data, where)

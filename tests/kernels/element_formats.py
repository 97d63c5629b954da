"""Element formats that kernels are tested and compiled with: all that there are."""

from learned_rounding.quant_core.formats import elements
from learned_rounding.quant_core.formats.elements import ElementFormat

__all__ = ["ELEMENTS"]

ELEMENTS = {name.lower(): element for name, element in vars(elements).items() if isinstance(element, ElementFormat)}

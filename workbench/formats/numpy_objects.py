"""What NumPy puts into a pickle beside arrays: element types, and single numbers.

    numpy.core.multiarray.scalar(dtype, bytes)        numpy.core is numpy._core since 2.0
    numpy.dtype(code, False, True), state (version, byte order, None, None, None, -1, -1, flags)

Source: NumPy 2.4 numpy/_core/src/multiarray/scalartypes.c.src (gentype_reduce), descriptor.c (arraydescr_reduce).
"""

from __future__ import annotations

from typing import Any

from workbench.dtypes import DTYPES, NUMPY_CODES, DType, decode
from workbench.tree import Inert


def numpy_number(node: Inert) -> Any:
    """A NumPy number as Python's own, which holds it exactly; any other scalar as it is."""
    element, data = numpy_element(node.args[0]), node.args[1]
    if element is None or not isinstance(data, bytes) or len(data) != element[0].itemsize:
        return node
    return decode(element[0], data, element[1])[0]


def numpy_element(dtype: Any) -> tuple[DType, str] | None:
    """The element type and byte order of an inert numpy.dtype; None where torch has no such elements."""
    if not (isinstance(dtype, Inert) and dtype.dotted == "numpy.dtype" and isinstance(dtype.args, tuple) and dtype.args):
        return None
    code, state = dtype.args[0], dtype.state if isinstance(dtype.state, tuple) else (3, "=", None, None, None)
    if not isinstance(code, str) or code not in NUMPY_CODES or len(state) < 5 or state[2:5] != (None, None, None):
        return None
    return DTYPES[NUMPY_CODES[code]], "big" if state[1] == ">" else "little"

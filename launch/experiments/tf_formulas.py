"""TensorFlow's functions for clipping, as their documentation has them, and the rule that does the same."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Grads = Sequence[NDArray[np.float64]]


def _l2(grads: Grads) -> float:
    return float(np.sqrt(sum(np.sum(grad * grad) for grad in grads)))


#: Functions of TensorFlow: the rule, and what the function's documentation says it returns.
TENSORFLOW: dict[str, tuple[str, Callable[[Grads], Grads]]] = {
    "tf.clip_by_value(g, -0.1, 0.5)": (
        "value=-0.1:0.5",
        lambda grads: [np.minimum(np.maximum(grad, -0.1), 0.5) for grad in grads],
    ),
    "tf.clip_by_norm(g, 1.5)": (
        "norm=1.5",
        lambda grads: [grad * 1.5 / _l2([grad]) if _l2([grad]) > 1.5 else grad for grad in grads],
    ),
    "tf.clip_by_global_norm(grads, 4.0)": (
        "global_norm=4.0",
        lambda grads: [grad * 4.0 / max(_l2(grads), 4.0) for grad in grads],
    ),
    "tf.clip_by_average_norm(g, 0.1)": (
        "average_norm=0.1",
        lambda grads: [grad * 0.1 / max(_l2([grad]) / grad.size, 0.1) for grad in grads],
    ),
}

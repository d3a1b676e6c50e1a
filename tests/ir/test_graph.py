"""Keys of attributes: equal attributes are equal keys, whatever they are stored in."""

from __future__ import annotations

import numpy as np

from vacc_opt.ir.graph import attribute_key


def test_arrays_of_strings_are_compared_by_their_words() -> None:
    one, same = (np.array([word, "tail"], object) for word in ("head", "".join(["he", "ad"])))
    assert attribute_key({"value": one}) == attribute_key({"value": same})
    assert hash(attribute_key({"value": one})) == hash(attribute_key({"value": same}))
    assert attribute_key({"value": one}) != attribute_key({"value": np.array(["heap", "tail"], object)})


def test_element_types_and_shapes_are_part_of_the_key() -> None:
    keys = [
        attribute_key({"value": np.zeros(4, np.float32)}),
        attribute_key({"value": np.zeros(4, np.int32)}),
        attribute_key({"value": np.zeros((2, 2), np.float32)}),
        attribute_key({"value": (0, 0, 0, 0)}),
        attribute_key({"value": (0.0, 0.0, 0.0, 0.0)}),
    ]
    assert len(set(keys)) == len(keys)

"""What users bring works as in plain Keras, or is refused in one line that names the remedy."""

import numpy as np
import pytest
import situations
from worlds import marked, results_of

pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.timeout(800)]

BACKENDS = ["one_device", "mirrored-2", "multiworker-2", "ps-1"]
DEFAULT = {
    "one_device": [
        *("pair", "stateful", "sparse", "never_fitted", "batched_for_anything"),
        *("stream_of_ragged", "stream_of_sparse", "ragged_arrays", "sparse_arrays"),
    ],
    "multiworker-2": [
        *("cached", "strings", "extremes", "branch", "branch_by_mpi"),
        *("batched", "generator", "py_dataset", "tuple_of_inputs"),
    ],
    "ps-1": [
        *("pair", "strings", "callback", "extremes", "spectral", "muon", "branch", "stream_of_ragged"),
        *("batched", "generator"),
    ],
}
# The words of a refusal, by case and by world; "" for all.
REFUSED = {
    ("stateful", "mirrored-2"): "leave its batch size open",
    ("stateful", "multiworker-2"): "leave its batch size open",
    ("stateful", "ps-1"): "leave its batch size open",
    ("branch", "ps-1"): "inside a tf.cond or a loop",
    ("branch_by_mpi", "ps-1"): "inside a tf.cond or a loop",
    ("cached", "multiworker-2"): "a file of its own",
    ("branch", "mirrored-2"): "gradient_accumulation_steps",
    ("branch_by_mpi", "mirrored-2"): "gradient_accumulation_steps",
    ("branch", "multiworker-2"): "exchange='mpi'",
    ("compiled_outside", "mirrored-2"): "inside 'with run.strategy.scope():'",
    ("compiled_outside", "multiworker-2"): "inside 'with run.strategy.scope():'",
    ("compiled_outside", "ps-1"): "inside 'with run.strategy.scope():'",
    ("ragged", ""): "bring them to one",
    ("extremes", "ps-1"): "choose strategy='multiworker'",
    ("ragged_arrays", ""): "x.to_tensor() does",
    ("sparse_arrays", ""): "scipy.sparse.csr_matrix",
    ("stream_of_ragged", "mirrored-2"): "x.to_tensor(shape=[LENGTH])",
    ("stream_of_ragged", "multiworker-2"): "x.to_tensor(shape=[LENGTH])",
    ("stream_of_sparse", "mirrored-2"): "tf.sparse.to_dense(x)",
    ("stream_of_sparse", "multiworker-2"): "tf.sparse.to_dense(x)",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    return results_of(situations.__file__, tmp_path_factory.mktemp("worlds"), request)


@pytest.mark.parametrize(("case", "world"), marked(list(situations.CASES), BACKENDS, DEFAULT))
def test_situation_is_as_in_keras_or_refused(results, case, world):
    found = {k.partition("/")[2]: v for k, v in results(world).items() if k.startswith(f"{case}/")}
    words = REFUSED.get((case, world)) or REFUSED.get((case, ""))
    # A worker that comes when the other has written the whole file reads it.
    if words is not None and ("refused" in found or case != "cached"):
        said = str(found["refused"])
        assert words in said and "\n" not in said
        return
    wanted = {k.partition("/")[2]: v for k, v in results("keras").items() if k.startswith(f"{case}/")}
    assert "refused" not in found, found
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        if value.dtype.kind == "U":
            assert found[name].tolist() == value.tolist()
        else:
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
